"""Vectors that are pytrees."""

from typing import Any

import jax
import jax.numpy as jnp


def scale(factor: Any, x: Any) -> Any:
    """factor x, in x's dtype (a float32 step on a float64 vector promotes nothing)."""
    return jax.tree.map(lambda v: jnp.asarray(factor, v.dtype) * v, x)


def axpy(factor: Any, x: Any, y: Any) -> Any:
    """factor x + y, in y's dtype."""
    return jax.tree.map(lambda v, w: jnp.asarray(factor, w.dtype) * v + w, x, y)


def add(x: Any, y: Any) -> Any:
    """x + y."""
    return jax.tree.map(jnp.add, x, y)


def norm(x: Any) -> jax.Array:
    """The Euclidean norm over all leaves."""
    return jnp.sqrt(sum(jnp.vdot(v, v) for v in jax.tree.leaves(x)))
