"""Anomaly index of the classes, and detection rates of the verdicts that are based on it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def anomaly_index(values: jax.Array) -> jax.Array:
    """Anomaly index `(v - median) / s` of each value, in standard deviations of a normal distribution.

    s is 1.4826 times the median of |v - median| (Neural Cleanse), or 1.2533 times its mean where more than half of the
    values are equal (within 1e-6 of each other).

    Args:
      values: float [C]; NaN are ignored.

    Returns:
      float32 [C]; NaN where the value is NaN, zeros where all values are equal.
    """
    values = values.astype(jnp.float32)
    change = values - jnp.nanmedian(values)
    median, mean = jnp.nanmedian(jnp.abs(change)), jnp.nanmean(jnp.abs(change))
    return change / jnp.maximum(jnp.where(median > 1e-6, 1.4826 * median, 1.2533 * mean), 1e-6)


class Detection(NamedTuple):
    """Fractions of correct verdicts, float32 scalars; NaN when no model counts."""

    target: jax.Array
    """Fraction of the poisoned models with one target whose target was predicted."""
    poisoned: jax.Array
    """True positive rate: fraction of the poisoned models that were judged poisoned."""
    clean: jax.Array
    """True negative rate: fraction of the clean models that were judged clean."""
    balanced: jax.Array
    """Balanced accuracy: mean of the last two."""


def detection(
    predicted_targets: jax.Array, judged_poisoned: jax.Array, targets: jax.Array, poisoned: jax.Array
) -> Detection:
    """Fractions of correct verdicts of an audit of M models.

    Args:
      predicted_targets: int32 [M], the class with the highest anomaly score.
      judged_poisoned: bool [M], whether the audit judges the model to be poisoned.
      targets: int32 [M], the attack's target class, -1 where there is none or more than one.
      poisoned: bool [M], whether the model is poisoned.

    Returns:
      The fractions.
    """

    def share(correct: jax.Array, counted: jax.Array) -> jax.Array:
        return (correct & counted).sum(dtype=jnp.float32) / counted.sum(dtype=jnp.float32)

    true_positive, true_negative = share(judged_poisoned, poisoned), share(~judged_poisoned, ~poisoned)
    target = share(predicted_targets == targets, poisoned & (targets >= 0))
    return Detection(target, true_positive, true_negative, (true_positive + true_negative) / 2)
