"""BNP: prune the channels whose statistics on clean images differ from the running ones.

R. Zheng, R. Tang, J. Li and L. Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022.

Threat model: the defender has the model and clean images, which need no labels. The running statistics of batch
normalisation were estimated on poisoned training data; where a channel responds to the trigger, the statistics of clean
images differ from them.

For each normalisation, with μ_b, σ_b the mean and standard deviation of its input in evaluation mode (over images and
positions), and μ_r, σ_r the running ones:

    KL_c = log(σ_r / σ_b) + (σ_b² + (μ_b - μ_r)²) / (2 σ_r²) - 1/2      KL divergence of N(μ_b, σ_b²) from N(μ_r, σ_r²)
    γ_c = 0    where KL_c > mean_c KL + u std_c KL      (sample standard deviation over the layer, u = 3)

The cost is one forward pass of 500 images. Requires batch normalisation: every model in bdjax.models but mnist_cnn,
vgg16, vgg19, vit and convnext. It cannot find a backdoor that was planted without forward passes on triggered images in
training mode (an edited model), because the running statistics then do not show it.

Deviations:
- σ_b² is the population variance, as Flax's running variance is; the release uses the sample variance.
- Variances are floored at 1e-12, so that a dead channel does not divide by zero.
- The images are drawn at random; the release takes the first batch of its loader.
- BackdoorBench's version also zeroes β, uses variances in the logarithm, and reads the running statistics after a
  poisoned batch has overwritten them. None of this is reproduced.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bdjax import models
from bdjax.defenses import _outliers
from bdjax.defenses._masks import norm_scales
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
    """Prune the channels whose KL divergence is an outlier within their layer.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]). Its callback receives the variables with the number of channels
        `pruned`.
      key: random key that draws the images.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no batch normalisation.
    """
    layers = norm_scales("bnp", victim.model, victim.variables)
    running = models.kernels(victim.variables["batch_stats"])
    order = np.sort(np.asarray(jax.random.permutation(key, len(view.images)))[: config.images])
    clean = norm_input_moments(victim.model, victim.variables, view.images[order])
    measures = {
        layer: kl_divergence(*clean[layer], running[f"{layer}/mean"], running[f"{layer}/var"])
        for layer in layers
        if layer in clean
    }
    return _outliers.prune_outliers(victim, measures, config.u, view)


def kl_divergence(mean: Any, variance: Any, running_mean: Any, running_variance: Any) -> np.ndarray:
    """KL divergence of the normal distribution of the clean images from the running one, per channel.

    Args:
      mean: mean on the clean images, [C].
      variance: their variance, [C].
      running_mean: running mean, [C].
      running_variance: running variance, [C].

    Returns:
      float64 [C].
    """
    mean, variance, running_mean, running_variance = (
        np.asarray(value, np.float64) for value in (mean, variance, running_mean, running_variance)
    )
    clean, running = np.maximum(variance, _SMALLEST), np.maximum(running_variance, _SMALLEST)
    return np.log(running / clean) / 2 + (clean + (mean - running_mean) ** 2) / (2 * running) - 0.5


_SMALLEST = 1e-12
"""Floor of the variances."""


def norm_input_moments(
    model: Model, variables: Variables, images: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of the input of every batch normalisation in evaluation mode.

    Args:
      model: the classifier.
      variables: variables of the model.
      images: stored [n, H, W, C].

    Returns:
      (mean, variance), float64 [C] each, by layer.
    """
    batches, moments = _outliers.reduce_norm_inputs(model, variables, images, _batch_moments), {}
    for layer in batches[0][1]:
        by_batch = [(count, *(value.astype(np.float64) for value in batch[layer])) for count, batch in batches]
        mean = sum(count * batch_mean for count, batch_mean, _ in by_batch) / len(images)
        spread = sum(count * (variance + (batch_mean - mean) ** 2) for count, batch_mean, variance in by_batch)
        moments[layer] = (mean, spread / len(images))
    return moments


def _batch_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each channel of x, float32 [N, ..., C]."""
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), x.var(axes)
