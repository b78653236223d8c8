"""3x3 convolution by Winograd's minimal filtering F(2x2, 3x3): 16 products per 2x2 output pixels instead of 36.

A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1:

    Y = A^T [(G w G^T) * (B^T d B)] A       d: tiles of 4x4 pixels at stride 2; *: for each of the 16 positions a
                                            matrix product over channels, for all tiles at once

The transformation is linear in x and in w, and its coefficients are 0, 1/2 and 1, so in float32 it is as exact as a
plain convolution. The transforms cost memory traffic, so it is faster only for many channels.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.models.cpu.tiling import shifted_slices, sum_over_batch

_B = (
    ((0, 1), (2, -1)),
    ((1, 1), (2, 1)),
    ((2, 1), (1, -1)),
    ((1, 1), (3, -1)),
)  # rows of B^T: (position, sign) in the tile
_A = (((0, 1), (1, 1), (2, 1)), ((1, 1), (2, -1), (3, -1)))  # rows of A^T
_A_BACK = tuple(tuple((p, dict(row)[a]) for p, row in enumerate(_A) if a in dict(row)) for a in range(4))
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_TILES = 1024  # tiles per pass, so that they fit into the cache

Rows = Sequence[Sequence[tuple[int, int]]]
Grid = list[list[jax.Array]]


def is_faster(x: jax.Array, shape: Sequence[int], least: int = 2**14) -> bool:
    """Whether Winograd's filtering supports these shapes and is faster than XLA's convolution, as measured on a CPU.

    Args:
      x: images [N, H, W, I].
      shape: shape [K, K, I, O] of the kernel.
      least: smallest I times O for which it is faster; 2**12 for the kernel's gradient.

    Returns:
      True or False.
    """
    number, height, width, _ = x.shape
    side, _, inputs, outputs = shape
    is_supported = side == 3 and not height % 2 and not width % 2 and x.dtype == jnp.float32
    return is_supported and inputs * outputs >= least and number * height * width >= 256


def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolve images [N, H, W, I], H and W even, with a kernel [3, 3, I, O], zero-padded, to [N, H, W, O]."""
    _, height, width, _ = x.shape
    expand = jnp.asarray(_G, w.dtype)
    kernels = jnp.einsum("ap,bq,pqio->abio", expand, expand, w)

    def of_images(x: jax.Array) -> jax.Array:
        out = _transform(
            [
                [jnp.einsum("nhwi,io->nhwo", tile, kernels[a, b]) for b, tile in enumerate(row)]
                for a, row in enumerate(_tiles(x))
            ],
            _A,
        )
        return jnp.stack([jnp.stack(row, 3) for row in out], 2).reshape(len(x), height, width, -1)

    count = _images_per_pass(x)
    return of_images(x) if len(x) <= count else lax.map(lambda image: of_images(image[None])[0], x, batch_size=count)


def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Compute the gradient of :func:`convolve` with respect to its kernel from images and cotangents [N, H, W, O]."""

    def of_images(x: jax.Array, g: jax.Array) -> jax.Array:
        cotangents = _transform([[g[:, p::2, q::2] for q in range(2)] for p in range(2)], _A_BACK)
        products = [
            [tile.reshape(-1, x.shape[-1]).T @ back.reshape(-1, g.shape[-1]) for tile, back in zip(*rows, strict=True)]
            for rows in zip(_tiles(x), cotangents, strict=True)
        ]
        return jnp.stack([jnp.stack(row) for row in products])

    total = sum_over_batch(of_images, _images_per_pass(x), x, g)
    back = jnp.asarray(_G.T, total.dtype)
    return jnp.einsum("pa,qb,abio->pqio", back, back, total)


def _images_per_pass(x: jax.Array) -> int:
    """Return the number of images whose tiles fit into one pass."""
    return max(1, _TILES * 4 // (x.shape[1] * x.shape[2]))


def _tiles(x: jax.Array) -> Grid:
    """Return B^T d B of all tiles: 4 rows of 4 arrays [N, H / 2, W / 2, I]."""
    return _transform(shifted_slices(x, 4), _B)


def _transform(grid: Grid, rows: Rows) -> Grid:
    """Return M grid M^T for a sparse matrix M, given by its rows of (position, sign)."""
    return [
        [
            reduce(jnp.add, (grid[p][q] if s * t == 1 else -grid[p][q] for p, s in above for q, t in left))
            for left in rows
        ]
        for above in rows
    ]
