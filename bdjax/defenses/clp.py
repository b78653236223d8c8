"""CLP: prune the channels with an outlying Lipschitz bound, without any data.

R. Zheng, R. Tang, J. Li and L. Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
arXiv:2208.03111.

Threat model: the defender has only the model; the images of the view are not used.

For a convolution with kernel W whose output enters a batch normalisation with scale γ, bias β and running variance σ²:

    L_c = s(W_c) |γ_c| / sqrt(σ²_c),      s: the largest singular value of W_c as a matrix [C_in, kH kW]
    γ_c = β_c = 0    where L_c > mean_c L + u std_c L      (sample standard deviation over the layer, u = 3)

s is the bound that the authors' release computes, not the operator norm of the convolution. In a layer of C channels a
single channel can lie at most (C - 1) / sqrt(C) standard deviations above the mean. With u = 3, layers with fewer than
11 channels are therefore never pruned, and layers with 16 rarely.

Requires a convolution whose output enters a batch normalisation and nothing else: all such layers of cnn, small_vgg,
vgg16_bn, vgg19_bn, vgg_cifar, resnet, resnet18 (also _imagenet and _cifar), mobilenet_v2, mobilenet_v3, efficientnet
and googlenet, and some layers of densenet121, preact_resnet18, senet18 and wide_resnet (see below).

Deviations:
- The release pairs each normalisation with the convolution defined last before it. This is right for its ResNet and, as
  it notes, wrong for pre-activation blocks. Here the pairs follow from the forward pass. A normalisation whose input is
  a sum or a concatenation is left out, and so is a convolution whose output is also used elsewhere; of a pre-activation
  block the second normalisation remains. Pooling or an activation may lie between convolution and normalisation.
- A channel with σ² = 0, whose bound is infinite in the release, is not pruned and is excluded from the layer's mean.
  As in the release, no ε is added to σ².
"""

from dataclasses import dataclass

import numpy as np

from bdjax import models
from bdjax.defenses import _outliers
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The outlier rule."""

    u: float = 3.0
    """u: channels this many standard deviations above their layer's mean are pruned; BackdoorBench uses 5 on Tiny
    ImageNet."""

    def __post_init__(self) -> None:
        check_fields(self, "defense", (("u",), "a finite number", lambda v: np.isfinite(v)))


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Prune the channels whose Lipschitz bound is an outlier within their layer.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: its callback receives the variables with the number of channels `pruned`; its images are not used.
      key: not used.

    Returns:
      The purified variables.

    Raises:
      InputError: when no convolution of the model is followed by batch normalisation.
    """
    pairs = models.norm_kernels(victim.model)
    if not pairs:
        raise InputError(
            f"clp needs a convolution whose output enters a batch normalisation, and model {victim.model.name!r} has "
            "none. Use a model that has (cnn, resnet18, vgg16_bn), or fine_pruning, which needs only the last layer."
        )
    leaves, stats = (models.kernels(victim.variables[kind]) for kind in ("params", "batch_stats"))
    measures = {
        norm: lipschitz_bounds(leaves[kernel], leaves[f"{norm}/scale"], stats[f"{norm}/var"])
        for norm, kernel in pairs.items()
        if f"{norm}/scale" in leaves
    }
    return _outliers.prune_outliers(victim, measures, config.u, view, biases=True)


def lipschitz_bounds(kernel: object, scale: object, variance: object) -> np.ndarray:
    """Lipschitz bound L of each output channel of a convolution with batch normalisation.

    Args:
      kernel: of the convolution, [kH, kW, C_in, C].
      scale: γ of the normalisation, [C].
      variance: its running variance, [C].

    Returns:
      float64 [C]; NaN where the variance is zero.
    """
    weights = np.asarray(kernel, np.float64)
    matrices = weights.reshape(-1, *weights.shape[2:]).transpose(2, 1, 0)  # [C, C_in, kH kW]
    deviation = np.sqrt(np.asarray(variance, np.float64))
    norms = np.linalg.svd(matrices, compute_uv=False)[:, 0]
    return norms * np.abs(np.asarray(scale, np.float64)) / np.where(deviation > 0, deviation, np.nan)
