"""Adversarial images: projected gradient ascent for one image, to be vmapped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def adversarial(
    objective: Callable[[jax.Array], jax.Array], image: jax.Array, start: jax.Array, steps: int, step: Any, bound: Any,
    norm: str = "l2",
) -> jax.Array:  # fmt: skip
    """PGD for one image: `steps` steps uphill from `start`, each projected to the ball around `image`, then to [0, 1].

    Args:
      objective: image [H, W, C] -> scalar, maximised; step, bound: in units of [0, 1], may be traced.
      norm: "l2": steps of length `step` along the gradient; "linf": of its sign.

    Returns: [H, W, C]. Clipping comes last and never leaves the ball, for the image itself is in [0, 1].
    """

    def one(_: Any, current: jax.Array) -> jax.Array:
        gradient = jax.grad(objective)(current)
        length = jnp.maximum(jnp.linalg.norm(gradient), 1e-12)
        way = gradient / length if norm == "l2" else jnp.sign(gradient)
        return project(current + step * way, image, bound, norm)

    written_out = jax.default_backend() == "cpu"  # a loop is 1.4 to 2 times slower there, though quicker to compile
    return jax.lax.fori_loop(0, steps, one, start, unroll=written_out)


def project(moved: jax.Array, image: jax.Array, bound: Any, norm: str = "l2") -> jax.Array:
    """`moved` [H, W, C], brought into the ball of radius `bound` around `image`, then into [0, 1]."""
    change = moved - image
    if norm == "l2":
        change = change * jnp.minimum(1, bound / jnp.maximum(jnp.linalg.norm(change), 1e-12))
    else:
        change = jnp.clip(change, -bound, bound)
    return jnp.clip(image + change, 0, 1)
