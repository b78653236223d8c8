"""MINRES (Paige and Saunders, SIAM J. Numer. Anal. 12, 1975) in JAX: neither jax, jaxopt nor lineax has it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax.hypergrad._repeat import repeat


class _State(NamedTuple):
    """Lanczos vectors v, search directions w (last and the one before), solution, and the last two rotations."""

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
    """Signed: its size is ‖b − A x‖."""


def minres(
    matvec: Callable[[jax.Array], jax.Array], b: jax.Array, iterations: int, tolerance: float = 0.0
) -> jax.Array:
    """x of the smallest ‖b − A x‖ in the Krylov space of K products, A symmetric, b [d].

    Lanczos makes A tridiagonal, T; a plane rotation a step keeps its QR factors. Once the residual is below
    `tolerance` ‖b‖ nothing changes any more.
    """
    size, zero, one = jnp.linalg.norm(b), jnp.zeros_like(b), jnp.ones((), b.dtype)
    nil = jnp.zeros((), b.dtype)

    def step(s: _State) -> _State:
        p = matvec(s.v) - s.beta * s.v_last
        alpha = jnp.vdot(s.v, p)
        p = p - alpha * s.v
        beta = jnp.linalg.norm(p)
        # the new column of T under the last two rotations, then the rotation that zeroes its last entry
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
        going = jnp.abs(s.residual) > tolerance * size
        return jax.tree.map(lambda x, y: jnp.where(going, x, y), new, s)

    start = _State(b / jnp.where(size > 0, size, 1), zero, zero, zero, zero, nil, one, one, nil, nil, size)
    return repeat(step, start, iterations).x
