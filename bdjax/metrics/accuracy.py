"""Clean accuracy (ACC, also CA, C-Acc or BA in the papers)."""

import jax
import jax.numpy as jnp


def accuracy(predictions: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Fraction of correct predictions: mean of 1[prediction = label].

    Args:
      predictions: int32 [N].
      labels: int32 [N].
      mask: bool [N], True for the images that are counted; None: all images.

    Returns:
      float32 scalar in [0, 1]; NaN when no image is counted.
    """
    hits = (predictions == labels).astype(jnp.float32)
    weights = jnp.ones_like(hits) if mask is None else mask.astype(jnp.float32)
    return (hits * weights).sum() / weights.sum()
