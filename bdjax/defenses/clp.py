"""CLP: prune channels whose Lipschitz bound stands out of their layer, without any data (Zheng et al., ECCV 2022).

Threat model: the defender has the model alone; the images of the view are not looked at.

Of a convolution with kernel W and the batch normalisation (γ, β, running variance σ²) that its output enters:

    L_c = s(W_c) |γ_c| / sqrt(σ²_c),      s: the largest singular value of W_c as a matrix [C_in, kH kW]
    γ_c = β_c = 0    where L_c > mean_c L + u std_c L      (the sample's standard deviation, u = 3)

s is the release's bound, not the norm of the convolution as an operator. Among C channels one can stand out by at most
(C - 1) / sqrt(C) deviations: with u = 3, layers of fewer than 11 channels are never pruned, of 16 hardly.

Works on every model with a convolution whose output alone enters a batch normalisation: cnn, small_vgg, vgg16_bn,
vgg19_bn, vgg_cifar, resnet, resnet18 (and _imagenet, _cifar), mobilenet_v2 and _v3, efficientnet, googlenet; in
densenet121, preact_resnet18, senet18 and wide_resnet on part of the layers (below).

Deviations: the release takes the convolution that was defined last before a normalisation, right for its ResNet and
wrong before pre-activated blocks (it says so); here the pairs follow from the forward pass, and a normalisation that
takes a sum or a concatenation, or a convolution that also goes past it, is left out: of a pre-activated block the
second one remains. Pooling or an activation may stand between. No ε is added to σ², as there; a channel of σ² = 0,
which gives an infinite bound there, is left out of its layer's mean and kept.
"""

from dataclasses import dataclass

import numpy as np

from bdjax import models
from bdjax.defenses import _outliers
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """What stands out."""

    u: float = 3.0
    """Standard deviations above the layer's mean; BackdoorBench has 5 for Tiny-ImageNet."""

    def __post_init__(self) -> None:
        check_fields(self, "defense", (("u",), "a finite number", lambda v: np.isfinite(v)))


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Prune what stands out; draws nothing and looks at no image.

    Returns: the variables; the watch is shown them with how many channels were `pruned`.
    Raises InputError for a model without a convolution that batch normalisation follows.
    """
    pairs = models.followed(victim.model)
    if not pairs:
        raise InputError(
            f"clp needs a convolution whose output enters a batch normalisation, and model {victim.model.name!r} has "
            "none. Use a model that has (cnn, resnet18, vgg16_bn), or fine_pruning, which needs only the last layer."
        )
    leaves, stats = (models.kernels(victim.variables[kind]) for kind in ("params", "batch_stats"))
    measures = {
        norm: bound(leaves[kernel], leaves[f"{norm}/scale"], stats[f"{norm}/var"])
        for norm, kernel in pairs.items()
        if f"{norm}/scale" in leaves
    }
    view.watch.tick("pruning", 1, 1)
    return _outliers.prune(victim, measures, config.u, view, biases=True)


def bound(kernel: object, scale: object, variance: object) -> np.ndarray:
    """L of a convolution's channels, float64 [C]; NaN where the variance is zero.

    Args: kernel [kH, kW, C_in, C]; scale and variance [C].
    """
    weights = np.asarray(kernel, np.float64)
    matrices = weights.reshape(-1, *weights.shape[2:]).transpose(2, 1, 0)  # [C, C_in, kH kW]
    deviation = np.sqrt(np.asarray(variance, np.float64))
    norms = np.linalg.svd(matrices, compute_uv=False)[:, 0]
    return norms * np.abs(np.asarray(scale, np.float64)) / np.where(deviation > 0, deviation, np.nan)
