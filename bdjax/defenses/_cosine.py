"""The cosine of two vectors, safe at zero."""

import jax
import jax.numpy as jnp


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of two vectors; 0, with gradient 0, where one of them is 0."""
    scale = jnp.sqrt((a**2).sum() * (b**2).sum() + 1e-20)
    return (a * b).sum() / scale
