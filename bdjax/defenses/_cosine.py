"""Cosine similarity of two vectors, with a defined gradient at zero."""

import jax
import jax.numpy as jnp


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of two vectors; 0, with gradient 0, where one of them is zero."""
    norms = jnp.sqrt((a**2).sum() * (b**2).sum() + 1e-20)
    return (a * b).sum() / norms
