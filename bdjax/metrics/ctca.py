"""Accuracy of each class, and clean target-class accuracy (CTCA).

Hsieh et al., "Mitigating Backdoor Attacks using Activation-Guided Model Editing", 2024 (the method "age" here).
"""

import jax
import jax.numpy as jnp

from bdjax.metrics.accuracy import accuracy


def ctca(predictions: jax.Array, labels: jax.Array, target: jax.Array | int) -> jax.Array:
    """Clean target-class accuracy: mean of 1[prediction = target] over the clean images with label = target.

    It is near zero where a defense has unlearned the whole class instead of the backdoor alone.

    Args:
      predictions: int32 [N], of clean images.
      labels: int32 [N].
      target: the attack's target class.

    Returns:
      float32 scalar in [0, 1]; NaN when no image is of the class.
    """
    return accuracy(predictions, labels, labels == target)


def class_accuracy(predictions: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Accuracy of every class (:func:`ctca` with each class as the target).

    Args:
      predictions: int32 [N].
      labels: int32 [N].
      classes: number of classes C, static under jit.

    Returns:
      float32 [C]; NaN for a class without images.
    """
    hits = (predictions == labels).astype(jnp.float32)
    hits_and_ones = jnp.stack([hits, jnp.ones_like(hits)])
    correct, count = jax.vmap(lambda values: jax.ops.segment_sum(values, labels, classes))(hits_and_ones)
    return correct / count
