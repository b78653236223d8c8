"""Backdoor existence coefficient (BEC): how much of a backdoor's representation a defended model still has (Zhu et al.,
NeurIPS 2024).

Both forms are reconstructed from what the papers say of them. A similarity, not a proof: a model can have a low value
and be woken again, and any fine-tuning that moves features lowers it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FLOOR = 1e-3
"""Smallest denominator: where the clean model is as like the victim as this, the ratio says nothing."""


class Existence(NamedTuple):
    """BEC of a model."""

    layers: jax.Array
    """float32 [L]."""
    mean: jax.Array
    """float32 scalar, over layers."""
    clipped: jax.Array
    """int32 scalar, of how many layers the denominator was raised to FLOOR."""


def bec(defended: jax.Array, clean: jax.Array) -> Existence:
    """`BEC_l = (S_D - S_Cl) / (1 - S_Cl)` of each layer l, S = :func:`linear_cka` with the victim.

    S compares features on triggered images, of the channels with the victim's largest :func:`tac`. The victim itself
    (S_D = 1) scores 1, less only where the denominator is clipped; the clean model 0; a model less like the victim
    than the clean one is has a negative value.

    Args: S of the defended model and S of a model trained without poison, float32 [L].
    """
    distance = 1 - clean
    ratio = (defended - clean) / jnp.maximum(distance, FLOOR)
    return Existence(ratio, ratio.mean(), (distance < FLOOR).sum().astype(jnp.int32))


def bec_sigmoid(value: jax.Array, steepness: float = 10.0, centre: float = 0.5) -> jax.Array:
    """BI-BAU's form, `1 / (1 + exp(-steepness (BEC - centre)))`, in (0, 1).

    Its constants are not published. Ours, k = 10 and c = 0.5, take BEC 0 to 0.007 and BEC 1 to 0.993.
    """
    return jax.nn.sigmoid(steepness * (value - centre))
