"""BNP: prune channels whose statistics on clean images leave the running ones (Zheng et al., NeurIPS 2022).

Threat model: the defender has the model and clean images without labels. The running statistics of a victim's batch
normalisation come from poisoned training data; where a channel answers the trigger, clean images have others.

Of each layer, with μ_b and σ_b of what enters it (over images and places) in evaluation mode, μ_r and σ_r stored:

    KL_c = log(σ_r / σ_b) + (σ_b² + (μ_b - μ_r)²) / (2 σ_r²) - 1/2      N(μ_b, σ_b²) against N(μ_r, σ_r²)
    γ_c = 0    where KL_c > mean_c KL + u std_c KL      (the sample's standard deviation, u = 3)

One forward pass of 500 images. Works on every model with batch normalisation: cnn, small_vgg, resnet18,
preact_resnet18, vgg16_bn, mobilenet_v2 and all others but mnist_cnn, vgg16, vgg19, vit and convnext. A victim whose
training never showed it the trigger in training mode (an edited model) has nothing to be found by this.

Deviations: σ_b² is the population's, as Flax's running variance is (the release takes the sample's); variances are at
least 1e-12, so that a dead channel divides by nothing. The release takes the first batch of its loader, here the images
are drawn. BackdoorBench also zeroes β, has variances in the logarithm, and takes its statistics after they were
overwritten by a poisoned batch: none of it is done.
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
    """What is measured, and what stands out."""

    u: float = 3.0
    """Standard deviations above the layer's mean."""
    images: int = 500
    """How many are drawn of the clean images; all of them when there are fewer."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("u",), "a finite number", lambda v: np.isfinite(v)),
            (("images",), "at least 1", lambda v: v >= 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Prune what stands out.

    Args: view: clean images (stored [n, H, W, C]); key: draws some of them.
    Returns: the variables; the watch is shown them with how many channels were `pruned`.
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
    view.watch.tick("pruning", 1, 1)
    return _outliers.prune(victim, measures, config.u, view)


def divergence(mean: Any, variance: Any, running_mean: Any, running_variance: Any) -> np.ndarray:
    """KL divergence of the batch's normal distribution from the stored one, float64 [C]; all arguments [C]."""
    mean, variance, running_mean, running_variance = (
        np.asarray(one, np.float64) for one in (mean, variance, running_mean, running_variance)
    )
    own, other = np.maximum(variance, _LEAST), np.maximum(running_variance, _LEAST)
    return np.log(other / own) / 2 + (own + (mean - running_mean) ** 2) / (2 * other) - 0.5


_LEAST = 1e-12


def moments(model: Model, variables: Variables, images: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of what enters each batch normalisation in evaluation mode, float64 [C] each, by layer.

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
