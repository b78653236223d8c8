"""3x3 convolution of stride 2 whose derivatives of every order are matrix products, for XLA on a CPU.

XLA:CPU runs the kernel's gradient that JAX emits, a dilated convolution, at a sixth to a quarter of the speed of its
matrix product. y is linear in x and in w, so three functions are closed under differentiation:

    y = conv(x, w)        input_gradient(g, w) = dL/dx        kernel_gradient(x, g) = dL/dw
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from bdjax.models.cpu.convolution import LAYOUT, bilinear
from bdjax.models.cpu.tiling import shifted_slices, sum_over_batch

_SIDE = 3
_MANY = 256  # smallest number of input channels for which a matrix product is faster than XLA's convolution
_PIXELS = 2048  # output pixels per pass of the kernel's gradient, so that they fit into the cache


def is_supported(x: jax.Array, w: jax.Array) -> bool:
    """Whether :func:`conv` supports images [N, H, W, I] and a kernel [K, K, I, O]: K = 3, H and W even."""
    return w.shape[:2] == (_SIDE, _SIDE) and not any(side % 2 for side in x.shape[1:3])


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolve images [N, H, W, I] with a kernel [3, 3, I, O], zero-padded by one, to [N, H / 2, W / 2, O]."""
    return _strided_p.bind(x, w)


def input_gradient(g: jax.Array, w: jax.Array) -> jax.Array:
    """Compute the gradient of :func:`conv` with respect to its images from cotangents [N, H / 2, W / 2, O]."""
    return _input_gradient_p.bind(g, w)


def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Compute the gradient of :func:`conv` with respect to its kernel from images and cotangents."""
    return _kernel_gradient_p.bind(x, g)


def _strided(x: jax.Array, w: jax.Array) -> jax.Array:
    if w.shape[2] < _MANY:
        return lax.conv_general_dilated(x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)
    patches = jnp.concatenate([part for row in shifted_slices(x, _SIDE) for part in row], -1)
    return jnp.einsum("nhwi,io->nhwo", patches, w.reshape(-1, w.shape[-1]))


def _input_gradient(g: jax.Array, w: jax.Array) -> jax.Array:
    def interleaved(parts: Sequence[jax.Array], axis: int) -> jax.Array:
        """Combine the gradients from three positions of the kernel to those of even and odd pixels."""
        before, middle, after = parts
        later = lax.slice_in_dim(before, 1, None, axis=axis)  # the first one belongs to the padding
        odd = after + jnp.pad(later, [(0, int(i == axis)) for i in range(later.ndim)])
        both = jnp.stack([middle, odd], axis + 1)
        return both.reshape(*g.shape[:axis], -1, *both.shape[axis + 2 :])

    return interleaved([interleaved([jnp.einsum("nhwo,io->nhwi", g, weight) for weight in row], 2) for row in w], 1)


def _kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    def of_images(x: jax.Array, g: jax.Array) -> jax.Array:
        cotangents = g.reshape(-1, g.shape[-1])
        slices = shifted_slices(x, _SIDE)
        return jnp.stack([jnp.stack([part.reshape(-1, x.shape[-1]).T @ cotangents for part in row]) for row in slices])

    return sum_over_batch(of_images, max(1, _PIXELS // (g.shape[1] * g.shape[2])), x, g)


_strided_p = bilinear("strided_conv", _strided, images=True)
_input_gradient_p = bilinear("strided_conv_input_gradient", _input_gradient, images=True)
_kernel_gradient_p = bilinear("strided_conv_kernel_gradient", _kernel_gradient)

ad.defbilinear(_strided_p, lambda c, x, w: input_gradient(c, w), lambda c, x, w: kernel_gradient(x, c))
ad.defbilinear(_input_gradient_p, lambda c, g, w: conv(c, w), lambda c, g, w: kernel_gradient(c, g))
ad.defbilinear(_kernel_gradient_p, lambda c, x, g: input_gradient(g, c), lambda c, x, g: conv(x, c))
