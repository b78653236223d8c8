"""EP: prune the channels whose responses separate poisoned images from clean ones, by their entropy.

R. Zheng, R. Tang, J. Li and L. Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022.

Threat model: the defender has the model and unlabelled images **some of which carry the trigger**, without knowing
which, as in a poisoned training set. A view contains only clean images, so here EP is a reference method: it receives
the true trigger and applies it to a random share of the images. On clean images alone it finds nothing; `bnp`, from the
same paper, needs no poisoned images.

For each batch normalisation, with a_nc the maximum over positions of the input to channel c for image n:

    z_nc = (a_nc - mean_n a_nc) / std_n a_nc        (sample standard deviation)
    H_c  = -Σ p log p,     p: histogram of z_1c ... z_nc, with bins of 0.01 from the layer's minimum to its maximum
    γ_c = 0    where H_c < mean_c H - u std_c H      (sample standard deviation over the layer, u = 3)

With 500 images nearly every value falls into a bin of its own, so that H is log n minus a term that counts collisions.
It therefore depends on n, and is low where the clean values lie close together and a few lie far away. As in the
release, bins are open at both ends, and what remains after the last whole bin is not counted. In a layer of C channels
a single channel can deviate by at most (C - 1) / sqrt(C) standard deviations, so u = 3 is rarely reached in small
layers.

Requires batch normalisation: every model in bdjax.models but mnist_cnn, vgg16, vgg19, vit and convnext.

Deviations:
- The release uses images of the poisoned training set; here they are the defender's images with the test-time trigger.
- A channel with the same value for all images is not pruned; the release divides by zero there.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses import _outliers
from bdjax.defenses._masks import norm_scales
from bdjax.defenses._trigger import triggered
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim, to_float

NEEDS_TRIGGER = True


@dataclass(frozen=True)
class Config:
    """The images that are measured, and the outlier rule."""

    u: float = 3.0
    """u: channels this many standard deviations below their layer's mean are pruned; 4 is used on Tiny ImageNet."""
    images: int = 500
    """Number of images drawn; all of them when there are fewer."""
    poisoned_share: float = 0.1
    """Share of the images that carries the trigger, in (0, 1); at least one image."""
    bin_width: float = 0.01
    """Width of a histogram bin, in standard deviations; BackdoorBench uses 0.1."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("u",), "a finite number", lambda v: np.isfinite(v)),
            (("images",), "at least 1", lambda v: v >= 1),
            (("poisoned_share",), "in (0, 1)", lambda v: 0 < v < 1),
            (("bin_width",), "positive", lambda v: v > 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Prune the channels whose entropy is an outlier within their layer.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and the true trigger. Its callback receives the variables with the
        number of channels `pruned`.
      key: random key that draws the images, and those among them that carry the trigger.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no batch normalisation, or when the view has no trigger.
    """
    layers = norm_scales("ep", victim.model, victim.variables)
    stamped = triggered("ep", view, jax.random.fold_in(key, 0))
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), len(view.images)))[: config.images]
    number = max(1, int(config.poisoned_share * len(order)))
    mixed = jnp.concatenate([stamped[order[:number]], to_float(view.images[order[number:]])])
    batches = _outliers.reduce_norm_inputs(victim.model, victim.variables, mixed, _spatial_max)
    measures = {
        layer: -entropies(np.concatenate([batch[layer] for _, batch in batches]), config.bin_width)
        for layer in layers
        if layer in batches[0][1]
    }
    return _outliers.prune_outliers(victim, measures, config.u, view)


def entropies(values: Any, width: float) -> np.ndarray:
    """Entropy H of each channel of a layer.

    Args:
      values: a, the maxima of the channels before standardisation, [n, C].
      width: width of a histogram bin, in standard deviations.

    Returns:
      float64 [C]; NaN for a constant channel.
    """
    values = np.asarray(values, np.float64)
    centred = values - values.mean(0)
    deviation = np.sqrt((centred**2).sum(0) / max(len(values) - 1, 1))
    varying = deviation > 1e-9 * np.maximum(np.abs(values).max(0), 1e-30)
    entropy = np.full(values.shape[1], np.nan)
    if not varying.any():
        return entropy
    z = centred[:, varying] / deviation[varying]
    position = (z - z.min()) / width
    bins = math.floor(position.max())
    counted = (position != np.floor(position)) & (position < bins)
    for column, channel in enumerate(np.flatnonzero(varying)):
        bin_index = np.floor(position[counted[:, column], column])
        share = np.unique(bin_index, return_counts=True)[1] / len(values)
        entropy[channel] = -(share * np.log(share)).sum()
    return entropy


def _spatial_max(x: jax.Array) -> jax.Array:
    """Maximum of each channel over the positions of an image: [N, ..., C] -> [N, C]."""
    return x.max(tuple(range(1, x.ndim - 1)))
