"""A batch in pieces whose working set stays in a CPU's cache."""

from collections.abc import Callable

import jax
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
