"""The 3x3 convolution of stride 2 whose derivatives of every order are matrix products, for XLA on a CPU.

Of the derivatives that JAX emits for it, exchanged or dilated convolutions, XLA:CPU runs the kernel's at a sixth to a
quarter of its matrix product's speed. y is linear in x and in w, so three functions are closed under differentiation:

    y = strided(x, w)        input_gradient(g, w) = dL/dx        kernel_gradient(x, g) = dL/dw
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from bdjax.models.cpu.convolution import LAYOUT, bilinear
from bdjax.models.cpu.tiling import places, summed

_SIDE = 3
_MANY = 256  # channels from which on one matrix product is quicker than XLA's convolution
_PIXELS = 2048  # of the output that one pass of the kernel's gradient takes: they stay in the cache


def fits(x: jax.Array, w: jax.Array) -> bool:
    """Whether :func:`strided` is made for images [N, H, W, I] and a kernel [K, K, I, O]: K = 3, H and W even."""
    return w.shape[:2] == (_SIDE, _SIDE) and not any(side % 2 for side in x.shape[1:3])


def strided(x: jax.Array, w: jax.Array) -> jax.Array:
    """Images [N, H, W, I] with a kernel [3, 3, I, O], zero-padded by one on each side, to [N, H / 2, W / 2, O]."""
    return _strided_p.bind(x, w)


def input_gradient(g: jax.Array, w: jax.Array) -> jax.Array:
    """What :func:`strided` sends back to its images: cotangents [N, H / 2, W / 2, O] -> [N, H, W, I]."""
    return _input_gradient_p.bind(g, w)


def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """What it sends back to its kernel: [N, H, W, I] and [N, H / 2, W / 2, O] -> [3, 3, I, O]."""
    return _kernel_gradient_p.bind(x, g)


def _strided(x: jax.Array, w: jax.Array) -> jax.Array:
    if w.shape[2] < _MANY:
        return lax.conv_general_dilated(x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)
    seen = jnp.concatenate([place for row in places(x, _SIDE) for place in row], -1)
    return jnp.einsum("nhwi,io->nhwo", seen, w.reshape(-1, w.shape[-1]))


def _input_gradient(g: jax.Array, w: jax.Array) -> jax.Array:
    def interleaved(sent: Sequence[jax.Array], axis: int) -> jax.Array:
        """From what each of three places of the kernel sends to what even and odd pixels get."""
        before, middle, after = sent
        later = lax.slice_in_dim(before, 1, None, axis=axis)  # the first one's goes to the padding
        odd = after + jnp.pad(later, [(0, int(i == axis)) for i in range(later.ndim)])
        both = jnp.stack([middle, odd], axis + 1)
        return both.reshape(*g.shape[:axis], -1, *both.shape[axis + 2 :])

    return interleaved([interleaved([jnp.einsum("nhwo,io->nhwi", g, at) for at in row], 2) for row in w], 1)


def _kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    def of_piece(x: jax.Array, g: jax.Array) -> jax.Array:
        sent = g.reshape(-1, g.shape[-1])
        return jnp.stack([jnp.stack([at.reshape(-1, x.shape[-1]).T @ sent for at in row]) for row in places(x, _SIDE)])

    return summed(of_piece, max(1, _PIXELS // (g.shape[1] * g.shape[2])), x, g)


_strided_p = bilinear("strided_conv", _strided, images=True)
_input_gradient_p = bilinear("strided_conv_input_gradient", _input_gradient, images=True)
_kernel_gradient_p = bilinear("strided_conv_kernel_gradient", _kernel_gradient)

ad.defbilinear(_strided_p, lambda c, x, w: input_gradient(c, w), lambda c, x, w: kernel_gradient(x, c))
ad.defbilinear(_input_gradient_p, lambda c, g, w: strided(c, w), lambda c, g, w: kernel_gradient(c, g))
ad.defbilinear(_kernel_gradient_p, lambda c, x, g: input_gradient(g, c), lambda c, x, g: strided(x, c))
