"""EP: prune channels that poisoned images split in two, by their entropy (Zheng et al., NeurIPS 2022).

Threat model: the defender has the model and unlabelled images **of which some carry the trigger**, as a poisoned
training set has, without knowing which. A view holds clean images only, so this is a reference method: it is given the
true trigger, and puts it on a share of the images that it draws. From clean images alone there is nothing to find;
what needs no poisoned ones is `bnp`, of the same paper.

Of each layer of batch normalisation, with a_nc the largest value over all places of what enters channel c, image n:

    z_nc = (a_nc - mean_n a_nc) / std_n a_nc        (the sample's)
    H_c  = -Σ p log p,     p: shares of the n values of z in bins of 0.01 from the layer's least to its largest value
    γ_c = 0    where H_c < mean_c H - u std_c H      (the sample's, u = 3)

With 500 images nearly every value has a bin of its own, so that H is log n less what collides: it depends on n, and
what lowers it is a channel whose clean values crowd together beside a few far ones. Bins are open at both ends, and
what is left over of the last one is not counted (the release's). Among C channels one can stand out by at most (C - 1)
/ sqrt(C) deviations: in layers of few channels u = 3 is hardly reached.

Works on every model with batch normalisation: cnn, small_vgg, resnet18, preact_resnet18, vgg16_bn, mobilenet_v2 and all
others but mnist_cnn, vgg16, vgg19, vit and convnext.

Deviations: the release takes images of the poisoned training set, here they are the defender's, and the trigger is the
test-time one; a channel of the same value for all images, where the release divides by zero, is kept.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses import _outliers
from bdjax.defenses._masks import scales
from bdjax.defenses._trigger import triggered
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim, to_float

NEEDS_TRIGGER = True


@dataclass(frozen=True)
class Config:
    """What is measured, and what stands out."""

    u: float = 3.0
    """Standard deviations below the layer's mean; 4 is used for Tiny-ImageNet."""
    images: int = 500
    """How many are drawn of the images; all of them when there are fewer."""
    poisoned_share: float = 0.1
    """Part of them that carries the trigger, in (0, 1); at least one image."""
    bin_width: float = 0.01
    """Of the histogram, in standard deviations; BackdoorBench has 0.1."""

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
    """Prune what stands out.

    Args: view: clean images (stored [n, H, W, C]) and the trigger; key: draws images and which of them carry it.
    Returns: the variables; the watch is shown them with how many channels were `pruned`.
    Raises InputError for a model without batch normalisation, and without a trigger.
    """
    layers = scales("ep", victim.model, victim.variables)
    stamped = triggered("ep", view, jax.random.fold_in(key, 0))
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), len(view.images)))[: config.images]
    number = max(1, int(config.poisoned_share * len(order)))
    mixed = jnp.concatenate([stamped[order[:number]], to_float(view.images[order[number:]])])
    parts = _outliers.entering(victim.model, victim.variables, mixed, _highest)
    measures = {
        layer: -entropies(np.concatenate([part[layer] for _, part in parts]), config.bin_width)
        for layer in layers
        if layer in parts[0][1]
    }
    view.watch.tick("pruning", 1, 1)
    return _outliers.prune(victim, measures, config.u, view)


def entropies(values: Any, width: float) -> np.ndarray:
    """H of the channels of one layer, float64 [C]; NaN where a channel has one value only.

    Args: values: [n, C], before they are standardised; width: of a bin.
    """
    values = np.asarray(values, np.float64)
    centred = values - values.mean(0)
    deviation = np.sqrt((centred**2).sum(0) / max(len(values) - 1, 1))
    known = deviation > 1e-9 * np.maximum(np.abs(values).max(0), 1e-30)
    found = np.full(values.shape[1], np.nan)
    if not known.any():
        return found
    z = centred[:, known] / deviation[known]
    place = (z - z.min()) / width
    number = math.floor(place.max())
    counted = (place != np.floor(place)) & (place < number)
    for column, channel in enumerate(np.flatnonzero(known)):
        inside = np.floor(place[counted[:, column], column])
        share = np.unique(inside, return_counts=True)[1] / len(values)
        found[channel] = -(share * np.log(share)).sum()
    return found


def _highest(x: jax.Array) -> jax.Array:
    return x.max(tuple(range(1, x.ndim - 1)))
