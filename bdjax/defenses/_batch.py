"""How many images a step takes, and batches in the given order."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import Key


def batch_of(wanted: int, total: int, what: str = "images") -> int:
    """Images a step: `wanted`, or all there are, that the devices divide. Raises InputError when that is none.

    Args: what: names the images in the message.
    """
    size = min(wanted, total) // parallel.count() * parallel.count()
    if size == 0:
        raise InputError(
            f"{min(wanted, total)} {what} cannot be split over {parallel.count()} devices. "
            "Use --devices 1 or a larger --defense.batch-size."
        )
    return size


def own_part(leaf: jax.Array, axis: str | None) -> jax.Array:
    """This device's share of a batch that every device was given whole."""
    if axis is None:
        return leaf
    part = leaf.shape[0] // parallel.size(axis)
    return jax.lax.dynamic_slice_in_dim(leaf, jax.lax.axis_index(axis) * part, part)


def in_order(total: int, size: int, devices: int) -> dict[str, jax.Array]:
    """Batches in the given order, padded to one shape that the devices divide.

    index int32 and weight float32 [batches, padded size] (weights of a batch sum to one), images float32 [batches].
    """
    size = min(size, total)
    number = -(-total // size)
    padded = -(-size // devices) * devices
    place = np.arange(number)[:, None] * size + np.arange(padded)
    real = (np.arange(padded) < size) & (place < total)
    images = real.sum(1)
    return {
        "index": jnp.asarray(np.where(real, place, 0), jnp.int32),
        "weight": jnp.asarray(real / images[:, None], jnp.float32),
        "images": jnp.asarray(images, jnp.float32),
    }


def patched(weight: jax.Array, size: int, count: int, key: Key) -> jax.Array:
    """Exactly `count` images of each batch (all, if it has fewer), drawn at random: bool [batches, padded size].

    The draw is over the `size` places before padding, so that it is the same on any number of devices.
    """
    score = jax.random.uniform(key, (len(weight), size))
    score = jnp.where(weight > 0, jnp.pad(score, ((0, 0), (0, weight.shape[1] - size))), -1)
    rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
    return (rank < count) & (weight > 0)
