"""Dead leaves: random images with the statistics of natural ones, made without any data.

Discs and bars of random size, position and colour cover each other. Such images share edges, occlusion and the
scale-free spectrum with photographs (A. B. Lee, D. Mumford and J. Huang, "Occlusion Models for Natural Images: A
Statistical Study of a Scale-Invariant Dead Leaves Model", International Journal of Computer Vision 41, 2001).
"""

import jax
import jax.numpy as jnp

from bdjax.types import Key

LEAVES = 60
"""Shapes in one image."""


def dead_leaves(key: Key, count: int, shape: tuple[int, int, int]) -> jax.Array:
    """Draw random images.

    Args:
      key: random key.
      count: number of images N.
      shape: (H, W, C) of one image.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return jax.jit(_draw, static_argnums=(1, 2))(key, count, shape)


def _draw(key: Key, count: int, shape: tuple[int, int, int]) -> jax.Array:
    height, width, channels = shape
    names = ("radius", "row", "column", "angle", "thickness", "bar", "grey", "tint", "background")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    leaves = (LEAVES, count, 1, 1)

    def uniform(name: str, low: float = 0.0, high: float = 1.0) -> jax.Array:
        return jax.random.uniform(keys[name], leaves, minval=low, maxval=high)

    radius = min(height, width) * 0.5 * (0.08 + 0.9 * uniform("radius") ** 2)
    down = jnp.arange(height, dtype=jnp.float32)[:, None] - height * uniform("row")
    right = jnp.arange(width, dtype=jnp.float32)[None, :] - width * uniform("column")
    angle = uniform("angle", 0.0, jnp.pi)
    along = down * jnp.cos(angle) + right * jnp.sin(angle)
    across = right * jnp.cos(angle) - down * jnp.sin(angle)
    is_bar = (jnp.abs(along) < radius) & (jnp.abs(across) < radius * uniform("thickness", 0.15, 1.0))
    is_disc = along**2 + across**2 < radius**2
    covered = jnp.where(uniform("bar") < 0.5, is_bar, is_disc)[..., None]
    tint = jax.random.uniform(keys["tint"], (LEAVES, count, 1, 1, channels), minval=-0.25, maxval=0.25)
    colours = jnp.clip(uniform("grey")[..., None] + tint, 0, 1)
    background = jax.random.uniform(keys["background"], (count, 1, 1, channels))
    images = jnp.broadcast_to(background, (count, height, width, channels))
    images, _ = jax.lax.scan(lambda image, leaf: (jnp.where(leaf[0], leaf[1], image), None), images, (covered, colours))
    return images
