"""BNP: prune the channels whose statistics on clean images differ from the running ones (Zheng et al., NeurIPS 2022).

R. Zheng, R. Tang, J. Li and L. Liu, "Pre-activation Distributions Expose Backdoor Neurons".

Threat model: the defender has the model and clean images, which need no labels. The running statistics of batch
normalisation were estimated on poisoned training data; where a channel responds to the trigger, the statistics of clean
images differ from them.

For each normalisation, with μ_b, σ_b the mean and standard deviation of its input in evaluation mode (over images and
positions), and μ_r, σ_r the running ones:

    KL_c = log(σ_r / σ_b) + (σ_b² + (μ_b - μ_r)²) / (2 σ_r²) - 1/2      KL divergence of N(μ_b, σ_b²) from N(μ_r, σ_r²)
    γ_c = 0    where KL_c > mean_c KL + u std_c KL      (sample standard deviation over the layer, u = 3)

The cost is one forward pass of 500 images. Requires batch normalisation: every model in bdjax.models but mnist_cnn,
vgg16, vgg19, vit and convnext. It cannot find a backdoor that was put in without forward passes on triggered images in
training mode (an edited model), for then the running statistics do not show it.

Deviations from the release:
- σ_b² is the population variance, as Flax's running variance is; the release uses the sample variance.
- Variances are floored at 1e-12, so that a dead channel does not divide by zero.
- The images are drawn at random; the release takes the first batch of its loader.

BackdoorBench's version also zeroes β, uses variances in the logarithm, and reads the running statistics after a
poisoned batch has overwritten them. None of this is reproduced.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bdjax import models
from bdjax.defenses import _outliers
from bdjax.defenses._masks import scales
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The images that are measured, and the outlier rule."""

    u: float = 3.0
    """u: channels this many standard deviations above their layer's mean are pruned."""
    images: int = 500
    """Number of clean images drawn; all of them when there are fewer."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("u",), "a finite number", lambda v: np.isfinite(v)),
            (("images",), "at least 1", lambda v: v >= 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Prune the outliers.

    Args: view: clean images (stored [n, H, W, C]); key: draws the images.
    Returns: the variables; the watch is shown them with the number of channels `pruned`.
    Raises InputError for a model without batch normalisation.
    """
    layers = scales("bnp", victim.model, victim.variables)
    stored = models.kernels(victim.variables["batch_stats"])
    order = np.sort(np.asarray(jax.random.permutation(key, len(view.images)))[: config.images])
    found = moments(victim.model, victim.variables, view.images[order])
    measures = {
        layer: divergence(*found[layer], stored[f"{layer}/mean"], stored[f"{layer}/var"])
        for layer in layers
        if layer in found
    }
    return _outliers.prune(victim, measures, config.u, view)


def divergence(mean: Any, variance: Any, running_mean: Any, running_variance: Any) -> np.ndarray:
    """KL divergence of the normal distribution of the batch from the running one, float64 [C]; all arguments [C]."""
    mean, variance, running_mean, running_variance = (
        np.asarray(one, np.float64) for one in (mean, variance, running_mean, running_variance)
    )
    own, other = np.maximum(variance, _LEAST), np.maximum(running_variance, _LEAST)
    return np.log(other / own) / 2 + (own + (mean - running_mean) ** 2) / (2 * other) - 0.5


_LEAST = 1e-12


def moments(model: Model, variables: Variables, images: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of the input of each batch normalisation in evaluation mode, float64 [C] each, by layer.

    Args: images: stored [n, H, W, C].
    """
    parts, found = _outliers.entering(model, variables, images, _moments), {}
    for layer in parts[0][1]:
        of_parts = [(count, *(one.astype(np.float64) for one in part[layer])) for count, part in parts]
        mean = sum(count * own for count, own, _ in of_parts) / len(images)
        spread = sum(count * (variance + (own - mean) ** 2) for count, own, variance in of_parts)
        found[layer] = (mean, spread / len(images))
    return found


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), x.var(axes)
