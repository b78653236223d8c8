"""Backdoor existence coefficient (BEC): how much of a backdoor's representation remains in a defended model.

M. Zhu, S. Liang and B. Wu, "Breaking the False Sense of Security in Backdoor Defense through Re-Activation Attack",
NeurIPS 2024, arXiv:2405.16134.

Both forms are reconstructed from the descriptions in the papers. BEC is a measure of similarity, not a proof: the
backdoor of a model with a low value can often be reactivated, and any fine-tuning that changes features lowers BEC.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FLOOR = 1e-3
"""Smallest denominator: where the clean model is more similar to the victim than this, the ratio is meaningless."""


class BecResult(NamedTuple):
    """BEC of a model."""

    layers: jax.Array
    """float32 [L], BEC of each layer."""
    mean: jax.Array
    """float32 scalar, mean over the layers."""
    clipped: jax.Array
    """int32 scalar, number of layers whose denominator was raised to FLOOR."""


def bec(defended: jax.Array, clean: jax.Array) -> BecResult:
    """Backdoor existence coefficient `BEC_l = (S_D - S_Cl) / (1 - S_Cl)` of each layer l.

    S is the :func:`linear_cka` of a model's features with the victim's on triggered images, for the channels with the
    victim's largest :func:`tac`. The victim itself (S_D = 1) scores 1, or less where the denominator is clipped; the
    clean model scores 0; a model less similar to the victim than the clean model scores below 0.

    Args:
      defended: S_D of the defended model, float32 [L].
      clean: S_Cl of a model trained without poison, float32 [L].

    Returns:
      BEC of each layer, their mean, and the number of clipped denominators.
    """
    distance = 1 - clean
    ratio = (defended - clean) / jnp.maximum(distance, FLOOR)
    return BecResult(ratio, ratio.mean(), (distance < FLOOR).sum().astype(jnp.int32))


def bec_sigmoid(value: jax.Array, steepness: float = 10.0, centre: float = 0.5) -> jax.Array:
    """BI-BAU's form of BEC, `1 / (1 + exp(-steepness (BEC - centre)))`.

    Its constants are not published. Ours, k = 10 and c = 0.5, map BEC 0 to 0.007 and BEC 1 to 0.993.

    Args:
      value: BEC, float32 of any shape.
      steepness: k.
      centre: c, the BEC that is mapped to 0.5.

    Returns:
      float32 in (0, 1), of the same shape.
    """
    return jax.nn.sigmoid(steepness * (value - centre))
