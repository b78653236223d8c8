"""Outliers among classes, and how often verdicts that rest on them are right."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def anomaly_index(values: jax.Array) -> jax.Array:
    """`(v - median) / s`, about a normal's standard deviations: s is 1.4826 times the median of |v - median| (Neural
    Cleanse), or 1.2533 times its mean where more than half of the values are equal (below 1e-6 of each other).

    Args: float [C]; NaN are left out.
    Returns: float32 [C], NaN where the value is; zeros where all values are equal.
    """
    values = values.astype(jnp.float32)
    change = values - jnp.nanmedian(values)
    median, mean = jnp.nanmedian(jnp.abs(change)), jnp.nanmean(jnp.abs(change))
    return change / jnp.maximum(jnp.where(median > 1e-6, 1.4826 * median, 1.2533 * mean), 1e-6)


class Detection(NamedTuple):
    """Shares of right verdicts, float32 scalars; NaN when no model counts."""

    target: jax.Array
    """Of the poisoned models with one target, whose class was named."""
    poisoned: jax.Array
    """Of the poisoned models, that were called so."""
    clean: jax.Array
    """Of the clean models, that were not called poisoned."""
    balanced: jax.Array
    """Mean of the last two."""


def detection(named: jax.Array, called: jax.Array, targets: jax.Array, poisoned: jax.Array) -> Detection:
    """How often an audit of M models was right.

    Args:
      named: int32 [M], the class that it suspects most; called: bool [M], whether it calls the model poisoned.
      targets: int32 [M], the attack's target, -1 where there is none or several; poisoned: bool [M], the truth.
    """

    def share(right: jax.Array, counted: jax.Array) -> jax.Array:
        return (right & counted).sum(dtype=jnp.float32) / counted.sum(dtype=jnp.float32)

    found, spared = share(called, poisoned), share(~called, ~poisoned)
    return Detection(share(named == targets, poisoned & (targets >= 0)), found, spared, (found + spared) / 2)
