"""Linear algebra of vectors that are stored as pytrees."""

from typing import Any

import jax
import jax.numpy as jnp


def scale(factor: Any, x: Any) -> Any:
    """Return factor x in the dtype of x, so that a float32 factor does not change a float64 vector's dtype."""
    return jax.tree.map(lambda v: jnp.asarray(factor, v.dtype) * v, x)


def axpy(factor: Any, x: Any, y: Any) -> Any:
    """Return factor x + y in the dtype of y.

    Args:
      factor: scalar, may be traced.
      x: a pytree of arrays.
      y: a pytree with the structure and shapes of `x`.

    Returns:
      The sum, a pytree like `y`.
    """
    return jax.tree.map(lambda v, w: jnp.asarray(factor, w.dtype) * v + w, x, y)


def add(x: Any, y: Any) -> Any:
    """Return x + y, leaf by leaf."""
    return jax.tree.map(jnp.add, x, y)


def norm(x: Any) -> jax.Array:
    """Return the Euclidean norm over all leaves."""
    return jnp.sqrt(sum(jnp.vdot(v, v) for v in jax.tree.leaves(x)))
