"""What convolutions by matrix products are made of: slices of images, and a batch in pieces that stay in the cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def summed(function: Callable[..., jax.Array], piece: int, *arrays: jax.Array) -> jax.Array:
    """`function(*arrays)` of arrays [N, ...], where it is a sum over N: that of each `piece` of them, added up."""
    number = len(arrays[0])
    even = number // piece * piece
    if even < 2 * piece:
        return function(*arrays)
    pieces = tuple(leaf[piece:even].reshape(-1, piece, *leaf.shape[1:]) for leaf in arrays)
    first = function(*(leaf[:piece] for leaf in arrays))
    total = lax.scan(lambda total, part: (total + function(*part), None), first, pieces)[0]
    return total + function(*(leaf[even:] for leaf in arrays)) if even < number else total


def places(x: jax.Array, side: int) -> list[list[jax.Array]]:
    """Every second pixel from each place of a window of `side` on, around images [N, H, W, I], H and W even, that are
    zero-padded by one: `side` times `side` arrays [N, H / 2, W / 2, I]. `side` is at most 4."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [[padded[:, a : a + height - 1 : 2, b : b + width - 1 : 2] for b in range(side)] for a in range(side)]
