"""3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3): 16 products for 2x2 of the output in place of 36.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1:

    Y = A^T [(G w G^T) * (B^T d B)] A       d: tiles of 4x4, two apart; * for each of the 16 places, a matrix product
                                            over channels for all tiles at once

All is linear in x and in w, and the coefficients are 0, 1/2 and 1, so float32 stays as exact as a plain convolution
does. Transforming costs memory traffic, so it pays only where there are many channels.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.models.cpu.tiling import places, summed

_B = (
    ((0, 1), (2, -1)),
    ((1, 1), (2, 1)),
    ((2, 1), (1, -1)),
    ((1, 1), (3, -1)),
)  # rows of B^T: (place, sign) of the tile
_A = (((0, 1), (1, 1), (2, 1)), ((1, 1), (2, -1), (3, -1)))  # rows of A^T
_A_BACK = tuple(tuple((p, dict(row)[a]) for p, row in enumerate(_A) if a in dict(row)) for a in range(4))
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_TILES = 1024  # that one pass transforms: they stay in the cache

Rows = Sequence[Sequence[tuple[int, int]]]
Grid = list[list[jax.Array]]


def pays(x: jax.Array, shape: Sequence[int], least: int = 2**14) -> bool:
    """Whether this is the quicker way for images [N, H, W, I] and a kernel of `shape` [K, K, I, O]; measured on a CPU.

    least: of I times O; for the kernel's gradient it pays from 2**12 on.
    """
    number, height, width, _ = x.shape
    side, _, inputs, outputs = shape
    fits = side == 3 and not height % 2 and not width % 2 and x.dtype == jnp.float32
    return fits and inputs * outputs >= least and number * height * width >= 256


def convolved(x: jax.Array, w: jax.Array) -> jax.Array:
    """Images [N, H, W, I], H and W even, with a kernel [3, 3, I, O], zero-padded to [N, H, W, O]."""
    _, height, width, _ = x.shape
    expand = jnp.asarray(_G, w.dtype)
    kernels = jnp.einsum("ap,bq,pqio->abio", expand, expand, w)

    def of_piece(x: jax.Array) -> jax.Array:
        out = _transformed(
            [
                [jnp.einsum("nhwi,io->nhwo", tile, kernels[a, b]) for b, tile in enumerate(row)]
                for a, row in enumerate(_tiles(x))
            ],
            _A,
        )
        return jnp.stack([jnp.stack(row, 3) for row in out], 2).reshape(len(x), height, width, -1)

    piece = _piece(x)
    return of_piece(x) if len(x) <= piece else lax.map(lambda image: of_piece(image[None])[0], x, batch_size=piece)


def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """What :func:`convolved` sends back to its kernel: [N, H, W, I], [N, H, W, O] -> [3, 3, I, O]."""

    def of_piece(x: jax.Array, g: jax.Array) -> jax.Array:
        sent = _transformed([[g[:, p::2, q::2] for q in range(2)] for p in range(2)], _A_BACK)
        products = [
            [tile.reshape(-1, x.shape[-1]).T @ back.reshape(-1, g.shape[-1]) for tile, back in zip(*rows, strict=True)]
            for rows in zip(_tiles(x), sent, strict=True)
        ]
        return jnp.stack([jnp.stack(row) for row in products])

    total = summed(of_piece, _piece(x), x, g)
    back = jnp.asarray(_G.T, total.dtype)
    return jnp.einsum("pa,qb,abio->pqio", back, back, total)


def _piece(x: jax.Array) -> int:
    return max(1, _TILES * 4 // (x.shape[1] * x.shape[2]))


def _tiles(x: jax.Array) -> Grid:
    """B^T d B of all tiles: 4 times 4 arrays [N, H / 2, W / 2, I]."""
    return _transformed(places(x, 4), _B)


def _transformed(grid: Grid, rows: Rows) -> Grid:
    """M grid M^T for a matrix of few entries, given by rows."""
    return [
        [
            reduce(jnp.add, (grid[p][q] if s * t == 1 else -grid[p][q] for p, s in above for q, t in left))
            for left in rows
        ]
        for above in rows
    ]
