"""MINRES: the minimum-residual method for symmetric indefinite systems.

C. C. Paige and M. A. Saunders, "Solution of sparse indefinite systems of linear equations", SIAM Journal on Numerical
Analysis 12, 1975. Implemented here because neither jax, jaxopt nor lineax has it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax.hypergrad._repeat import repeat


class _State(NamedTuple):
    """Current and previous Lanczos vectors v, search directions w and plane rotations, and the solution x."""

    v: jax.Array
    v_last: jax.Array
    w: jax.Array
    w_last: jax.Array
    x: jax.Array
    beta: jax.Array
    cosine: jax.Array
    cosine_last: jax.Array
    sine: jax.Array
    sine_last: jax.Array
    residual: jax.Array
    """Residual with a sign; its absolute value is ‖b − A x‖."""


def minres(
    matvec: Callable[[jax.Array], jax.Array], b: jax.Array, iterations: int, tolerance: float = 0.0
) -> jax.Array:
    """Minimise ‖b − A x‖ over the Krylov space of K products with a symmetric matrix A.

    The Lanczos process reduces A to a tridiagonal matrix T; one plane rotation per step updates the QR factorisation
    of T.

    Args:
      matvec: product with A, [d] -> [d].
      b: right-hand side [d].
      iterations: K, the number of products.
      tolerance: relative residual below which the solution is no longer updated.

    Returns:
      x [d].
    """
    b_norm, zero, one = jnp.linalg.norm(b), jnp.zeros_like(b), jnp.ones((), b.dtype)
    nil = jnp.zeros((), b.dtype)

    def step(s: _State) -> _State:
        p = matvec(s.v) - s.beta * s.v_last
        alpha = jnp.vdot(s.v, p)
        p = p - alpha * s.v
        beta = jnp.linalg.norm(p)
        # apply the last two rotations to the new column of T, then compute the rotation that zeroes its last entry
        top = s.sine_last * s.beta
        middle = s.sine * alpha + s.cosine * s.cosine_last * s.beta
        bottom = s.cosine * alpha - s.cosine_last * s.sine * s.beta
        radius = jnp.maximum(jnp.hypot(bottom, beta), jnp.finfo(b.dtype).tiny)
        cosine, sine = bottom / radius, beta / radius
        w = (s.v - top * s.w_last - middle * s.w) / radius
        new = _State(
            p / jnp.maximum(beta, jnp.finfo(b.dtype).tiny), s.v, w, s.w, s.x + cosine * s.residual * w,
            beta, cosine, s.cosine, sine, s.sine, -sine * s.residual,
        )  # fmt: skip
        continues = jnp.abs(s.residual) > tolerance * b_norm
        return jax.tree.map(lambda x, y: jnp.where(continues, x, y), new, s)

    start = _State(b / jnp.where(b_norm > 0, b_norm, 1), zero, zero, zero, zero, nil, one, one, nil, nil, b_norm)
    return repeat(step, start, iterations).x
