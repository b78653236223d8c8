"""Convolution of stride 1 whose derivatives of every order are plain convolutions, for XLA on a CPU.

XLA:CPU runs the derivatives that JAX emits for a convolution (with transposed or dilated dimensions) on a slow path:
inside `lax.scan` 10 to 50 times slower than outside (jax issue 12868), and never with its fast bfloat16 kernels. If the
stride is 1, the padding preserves the size, and the kernel is odd and square, both derivatives are plain convolutions:

    y      = conv(x, w)
    dL/dx  = conv(g, w rotated by 180 degrees, with input and output channels swapped)
    dL/dw  = kernel_gradient(x, g), a convolution over the batch

The derivatives of `kernel_gradient` are `conv` again, so the pair is closed under differentiation. Stride 2 needs a
third function (:mod:`bdjax.models.cpu.strided`).
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bdjax.models.cpu import winograd

LAYOUT = ("NHWC", "HWIO", "NHWC")
_FEW = 4  # largest number of output channels for `_to_few`; occurs in the gradient with respect to the image
_ROWS = 160  # image rows per convolution in the kernel's gradient, so that its working set fits into the cache


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolve images [N, H, W, I] with an odd, square kernel [K, K, I, O], zero-padded, to [N, H, W, O]."""
    return _conv_p.bind(x, w)


def kernel_gradient(x: jax.Array, g: jax.Array, *, side: int) -> jax.Array:
    """Compute the gradient of :func:`conv` with respect to its kernel.

    Args:
      x: images [N, H, W, I].
      g: cotangents [N, H, W, O].
      side: side K of the kernel.

    Returns:
      Gradient [K, K, I, O].
    """
    return _kernel_gradient_p.bind(x, g, side=side)


def _rotated(w: jax.Array) -> jax.Array:
    """Return the kernel rotated by 180 degrees, with its channels swapped."""
    return w[::-1, ::-1].swapaxes(2, 3)


def _conv(x: jax.Array, w: jax.Array) -> jax.Array:
    if w.shape[-1] <= _FEW:
        return _to_few(x, w)
    if winograd.is_faster(x, w.shape):
        return winograd.convolve(x, w)
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)


def _to_few(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolve by one matrix product for all positions of the kernel and a sum of its shifted parts.

    Faster than XLA's convolution for few output channels (0.4 of its time for 16 to 3 channels, 0.95 for 32 to 3).
    """
    side, (_, height, width, _) = len(w), x.shape
    parts = jnp.pad(jnp.einsum("nhwi,abio->nhwabo", x, w), ((0, 0), *((side // 2,) * 2,) * 2, *((0, 0),) * 3))
    total = reduce(jnp.add, (parts[:, a : a + height, b : b + width, a, b] for a in range(side) for b in range(side)))
    return lax.optimization_barrier(total)  # without it XLA recomputes the sum for each use: 1.7 times slower


def _kernel_gradient(x: jax.Array, g: jax.Array, *, side: int) -> jax.Array:
    def of_images(x: jax.Array, g: jax.Array) -> jax.Array:
        # transposed as data, because inside a loop XLA is slow at convolutions of any other layout
        images, kernel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        return lax.conv_general_dilated(images, kernel, (1, 1), pad, dimension_numbers=LAYOUT)

    if side == 1:
        return (x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1]))[None, None]
    if winograd.is_faster(x, (side, side, x.shape[-1], g.shape[-1]), least=2**12):
        return winograd.kernel_gradient(x, g)
    pad = ((side // 2, side // 2),) * 2
    count = max(5, _ROWS // x.shape[1])
    total = of_images(x[:count], g[:count])
    for i in range(count, len(x), count):
        total = total + of_images(x[i : i + count], g[i : i + count])
    return total.transpose(1, 2, 0, 3)


def bilinear(name: str, run: Callable, static: str = "", images: bool = False) -> Primitive:
    """Create a bilinear primitive; the caller defines its derivatives.

    Args:
      name: name of the primitive.
      run: function of two arrays that computes it.
      static: name of a static parameter of `run`, "" for none.
      images: whether the operands are images and a kernel. Under vmap with a single kernel, the mapped axis is then
        merged with the axis of the images; otherwise the batching rules of `run`'s operations apply.

    Returns:
      The primitive.
    """
    primitive = Primitive(name)

    def batched(args: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
        (x, w), (axis, w_axis) = args, axes
        if not images or w_axis is not None:
            return jax.vmap(partial(run, **params), axes)(x, w), 0
        x = jnp.moveaxis(x, axis, 0)
        out = primitive.bind(x.reshape(-1, *x.shape[2:]), w, **params)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0

    primitive.def_impl(jax.jit(run, static_argnames=static or None))
    primitive.def_abstract_eval(
        lambda *avals, **params: jax.core.ShapedArray(
            (out := jax.eval_shape(partial(run, **params), *avals)).shape, out.dtype
        )
    )
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    batching.primitive_batchers[primitive] = batched
    return primitive


_conv_p = bilinear("plain_conv", _conv, images=True)
_kernel_gradient_p = bilinear("plain_conv_kernel_gradient", _kernel_gradient, "side")

ad.defbilinear(
    _conv_p,
    lambda g, x, w: conv(g, _rotated(w)),
    lambda g, x, w: kernel_gradient(x, g, side=w.aval.shape[0]),
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda c, x, g, *, side: conv(g, _rotated(c)),
    lambda c, x, g, *, side: conv(x, c),
)
