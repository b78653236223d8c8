"""Accuracy class by class, and that of an attack's target class (CTCA; Hsieh et al., 2024, which we call AGE)."""

import jax
import jax.numpy as jnp

from bdjax.metrics.accuracy import accuracy


def ctca(predictions: jax.Array, labels: jax.Array, target: jax.Array | int) -> jax.Array:
    """Clean target-class accuracy: mean of 1[prediction = target] over the clean images with label = target.

    Near zero where a defense has forgotten the whole class and not the backdoor alone.

    Args: predictions, labels int32 [N], of clean images; target: the attack's.
    Returns: float32 scalar in [0, 1]; NaN when no image is of the class.
    """
    return accuracy(predictions, labels, labels == target)


def class_accuracy(predictions: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """`ctca` of every class.

    Args: predictions, labels int32 [N]; classes: their number C, static under jit.
    Returns: float32 [C]; NaN for a class without an image.
    """
    hits = (predictions == labels).astype(jnp.float32)
    each = jnp.stack([hits, jnp.ones_like(hits)])
    right, count = jax.vmap(lambda values: jax.ops.segment_sum(values, labels, classes))(each)
    return right / count
