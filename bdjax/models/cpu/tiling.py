"""Building blocks of convolutions by matrix products: strided slices of images, and batches in cache-sized parts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def sum_over_batch(function: Callable[..., jax.Array], piece: int, *arrays: jax.Array) -> jax.Array:
    """Evaluate a function that is a sum over the leading axis by summing over parts of it.

    Args:
      function: `function(*arrays) -> array`, additive over the leading axis.
      piece: length of a part.
      *arrays: arrays [N, ...].

    Returns:
      `function(*arrays)`.
    """
    number = len(arrays[0])
    even = number // piece * piece
    if even < 2 * piece:
        return function(*arrays)
    pieces = tuple(leaf[piece:even].reshape(-1, piece, *leaf.shape[1:]) for leaf in arrays)
    first = function(*(leaf[:piece] for leaf in arrays))
    total = lax.scan(lambda total, part: (total + function(*part), None), first, pieces)[0]
    return total + function(*(leaf[even:] for leaf in arrays)) if even < number else total


def shifted_slices(x: jax.Array, side: int) -> list[list[jax.Array]]:
    """Return the slices of stride 2 that start at each position of a `side` x `side` window (side <= 4).

    The images [N, H, W, I], H and W even, are zero-padded by one. The result is `side` rows of `side` arrays
    [N, H / 2, W / 2, I].
    """
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [[padded[:, a : a + height - 1 : 2, b : b + width - 1 : 2] for b in range(side)] for a in range(side)]
