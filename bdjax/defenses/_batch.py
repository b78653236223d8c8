"""The number of images per step, and batches in file order or shuffled."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import Key


def batch_of(requested: int, total: int, noun: str = "images") -> int:
    """Return the batch size: the requested one, or all images, rounded down to a multiple of the number of devices.

    Args:
      requested: requested number of images per step.
      total: number of images.
      noun: name of the images, for the message.

    Returns:
      Images per step.

    Raises:
      InputError: when there are fewer images than devices.
    """
    size = min(requested, total) // parallel.count() * parallel.count()
    if size == 0:
        raise InputError(
            f"{min(requested, total)} {noun} cannot be split over {parallel.count()} devices. "
            "Use --devices 1 or a larger --defense.batch-size."
        )
    return size


def images_per_goal(largest: int, goals: int) -> int:
    """Return the images per step of a search for many goals at once: with more than ten goals fewer, at least five.

    A step for 10 to 50 goals then costs the same. On GTSRB's 43 classes, an audit's p-values with 5 or 6 images per
    step are like those with 24 (six `cnn` models, three of them backdoored).

    Args:
      largest: images per step with ten goals or fewer.
      goals: number of goals.
    """
    return int(np.clip(round(10 * largest / goals), min(5, largest), largest))


def device_part(leaf: jax.Array, axis: str | None) -> jax.Array:
    """Return this device's part of a batch [n, ...] that every device has in full."""
    if axis is None:
        return leaf
    rows = leaf.shape[0] // parallel.size(axis)
    return jax.lax.dynamic_slice_in_dim(leaf, jax.lax.axis_index(axis) * rows, rows)


def sequential_batches(total: int, size: int, devices: int) -> dict[str, jax.Array]:
    """Split images into batches in their given order, padded to one shape that the devices can share evenly.

    Args:
      total: number of images.
      size: images per batch; the last batch may have fewer.
      devices: number of devices.

    Returns:
      "index" int32 and "weight" float32, both [batches, padded size] (the weights of a batch sum to one, padding has
      weight zero), and "images" float32 [batches], the number of images in each batch.
    """
    size = min(size, total)
    count = -(-total // size)
    padded_size = -(-size // devices) * devices
    positions = np.arange(count)[:, None] * size + np.arange(padded_size)
    is_real = (np.arange(padded_size) < size) & (positions < total)
    image_counts = is_real.sum(1)
    return {
        "index": jnp.asarray(np.where(is_real, positions, 0), jnp.int32),
        "weight": jnp.asarray(is_real / image_counts[:, None], jnp.float32),
        "images": jnp.asarray(image_counts, jnp.float32),
    }


def shuffled_batches(key: Key, total: int, steps: int, size: int) -> jax.Array:
    """Draw an epoch of batches without repetition; what does not fill the last batch is left out.

    Args:
      key: random key that shuffles the images.
      total: number of images, at least steps * size.
      steps: number of batches.
      size: images per batch.

    Returns:
      Positions of the images, int32 [steps, size].
    """
    return jax.random.permutation(key, total)[: steps * size].reshape(steps, size)


def draw_patched(weight: jax.Array, size: int, count: int, key: Key) -> jax.Array:
    """Draw which images of each batch are patched: exactly `count`, or all if a batch has fewer.

    The draw is over the `size` positions before padding, so that it is the same on any number of devices.

    Args:
      weight: float32 [batches, padded size], zero for padding.
      size: images per batch before padding.
      count: number of patched images per batch.
      key: random key.

    Returns:
      bool [batches, padded size].
    """
    score = jax.random.uniform(key, (len(weight), size))
    score = jnp.where(weight > 0, jnp.pad(score, ((0, 0), (0, weight.shape[1] - size))), -1)
    rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
    return (rank < count) & (weight > 0)
