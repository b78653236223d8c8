"""Adversarial images by projected gradient ascent (PGD), for one image at a time: vmap it for a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def adversarial(
    objective: Callable[[jax.Array], jax.Array], image: jax.Array, start: jax.Array, steps: int, step: Any, bound: Any,
    norm: str = "l2",
) -> jax.Array:  # fmt: skip
    """Maximise an objective by PGD around one image.

    Each step is projected onto the ball around `image`, then clipped to [0, 1]. Clipping comes last and never leaves
    the ball, because the image itself is in [0, 1].

    Args:
      objective: function of an image [H, W, C] with scalar value, to be maximised.
      image: float32 [H, W, C] in [0, 1], center of the ball.
      start: float32 [H, W, C], where the ascent starts.
      steps: number of steps.
      step: length of a step in units of [0, 1]; may be traced.
      bound: radius of the ball in units of [0, 1]; may be traced.
      norm: "l2" (steps along the gradient) or "linf" (steps along its sign).

    Returns:
      The adversarial image, float32 [H, W, C] in [0, 1].
    """

    def ascend(_: Any, current: jax.Array) -> jax.Array:
        gradient = jax.grad(objective)(current)
        length = jnp.maximum(jnp.linalg.norm(gradient), 1e-12)
        direction = gradient / length if norm == "l2" else jnp.sign(gradient)
        return project(current + step * direction, image, bound, norm)

    unroll = jax.default_backend() == "cpu"  # a loop is 1.4 to 2 times slower there, though quicker to compile
    return jax.lax.fori_loop(0, steps, ascend, start, unroll=unroll)


def project(candidate: jax.Array, image: jax.Array, bound: Any, norm: str = "l2") -> jax.Array:
    """Project an image onto the ball around another image, then clip it to [0, 1].

    Args:
      candidate: float32 [H, W, C], the image to project.
      image: float32 [H, W, C], center of the ball.
      bound: radius of the ball, in units of [0, 1].
      norm: "l2" or "linf".

    Returns:
      The projected image, float32 [H, W, C] in [0, 1].
    """
    change = candidate - image
    if norm == "l2":
        change = change * jnp.minimum(1, bound / jnp.maximum(jnp.linalg.norm(change), 1e-12))
    else:
        change = jnp.clip(change, -bound, bound)
    return jnp.clip(image + change, 0, 1)
