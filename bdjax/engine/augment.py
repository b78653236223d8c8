"""Augmentation on the device: one image, one key; `policy(name)` gives a batch function.

Crop offsets, flips and cut-outs are drawn per image from its own key, so a batch may be split over
devices, scanned or looped and still see the same pictures.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bdjax.types import Images, Key

POLICIES = ("none", "crop", "crop_flip", "crop_flip_cutout")


def crop(image: jax.Array, key: Key, pad: int = 4) -> jax.Array:
    """Zero-pad [H, W, C] by `pad` pixels and cut an H x W window at a random offset."""
    offset = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


def flip(image: jax.Array, key: Key) -> jax.Array:
    """Mirror [H, W, C] left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cutout(image: jax.Array, key: Key, size: int = 16) -> jax.Array:
    """Zero a `size` x `size` square centred on a random pixel of [H, W, C] (DeVries and Taylor, 2017)."""
    height, width, _ = image.shape
    row, column = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    half = size // 2
    inside = (rows >= row - half) & (rows < row + half) & (columns >= column - half) & (columns < column + half)
    return jnp.where(inside[..., None], 0, image)


def policy(name: str) -> Callable[[Images, Key], Images]:
    """The batch augmentation `name` (one of POLICIES): images [N, H, W, C], keys [N] -> images."""
    steps = {
        "none": (),
        "crop": (crop,),
        "crop_flip": (crop, flip),
        "crop_flip_cutout": (crop, flip, cutout),
    }[name]

    def one(image: jax.Array, key: Key) -> jax.Array:
        for index, step in enumerate(steps):
            image = step(image, jax.random.fold_in(key, index))
        return image

    return jax.vmap(one) if steps else lambda images, keys: images
