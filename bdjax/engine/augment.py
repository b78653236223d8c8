"""Data augmentation on the device, with one random key per image.

Crop offsets, flips and cut-outs are drawn from the key of the image, so the result does not depend on how a batch is
split over devices, and is the same in a scan and in a loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bdjax.types import Images, Key

POLICIES = ("none", "crop", "crop_flip", "crop_flip_cutout")


def crop(image: jax.Array, key: Key, pad: int = 4) -> jax.Array:
    """Zero-pad an image and crop a window of the original size at a random offset.

    Args:
      image: [H, W, C].
      key: random key.
      pad: padding in pixels on every side.

    Returns:
      The cropped image [H, W, C].
    """
    offset = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


def flip(image: jax.Array, key: Key) -> jax.Array:
    """Flip an image [H, W, C] left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cutout(image: jax.Array, key: Key, size: int = 16) -> jax.Array:
    """Set a square centred on a random pixel to zero (Cutout; DeVries and Taylor, 2017).

    Args:
      image: [H, W, C].
      key: random key.
      size: side of the square in pixels.

    Returns:
      The image [H, W, C] with the square at zero.
    """
    height, width, _ = image.shape
    row, column = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    half = size // 2
    inside = (rows >= row - half) & (rows < row + half) & (columns >= column - half) & (columns < column + half)
    return jnp.where(inside[..., None], 0, image)


def policy(name: str) -> Callable[[Images, Key], Images]:
    """Return the augmentation `name` (one of POLICIES), a function of images [N, H, W, C] and keys [N]."""
    steps = {
        "none": (),
        "crop": (crop,),
        "crop_flip": (crop, flip),
        "crop_flip_cutout": (crop, flip, cutout),
    }[name]

    def augment(image: jax.Array, key: Key) -> jax.Array:
        for index, step in enumerate(steps):
            image = step(image, jax.random.fold_in(key, index))
        return image

    return jax.vmap(augment) if steps else lambda images, keys: images
