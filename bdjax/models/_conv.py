"""Convolution whose derivatives of every order are plain convolutions, for XLA on a CPU.

XLA:CPU runs the derivatives that JAX emits for a convolution (exchanged or dilated dimensions) on a slow path: inside
`lax.scan` 10 to 50 times slower than outside (jax issue 12868), and never by its fast bfloat16 kernels. Where the
stride is 1, the padding keeps the size and the kernel is odd and square, both derivatives are plain:

    y      = conv(x, w)
    dL/dx  = conv(g, w turned by 180 degrees, its channels exchanged)
    dL/dw  = kernel_gradient(x, g), a convolution over the batch

and the derivatives of `kernel_gradient` are `conv` again, so the pair is closed under differentiation.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_FEW = 4  # channels of an image at most: what the first layer sends back to it
_ROWS = 160  # of images that one convolution of the kernel's gradient takes: its working set stays in the cache


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """Images [N, H, W, I] with an odd, square kernel [K, K, I, O], zero-padded to [N, H, W, O]."""
    return _conv_p.bind(x, w)


def kernel_gradient(x: jax.Array, g: jax.Array, *, side: int) -> jax.Array:
    """What :func:`conv` sends back to its kernel: images [N, H, W, I], cotangents [N, H, W, O] -> [K, K, I, O]."""
    return _kernel_gradient_p.bind(x, g, side=side)


def _turned(w: jax.Array) -> jax.Array:
    return w[::-1, ::-1].swapaxes(2, 3)


def _conv(x: jax.Array, w: jax.Array) -> jax.Array:
    if w.shape[-1] <= _FEW:
        return _to_few(x, w)
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _to_few(x: jax.Array, w: jax.Array) -> jax.Array:
    """One matrix product for all places of the kernel, then their sum, each shifted: XLA's convolution is made for more
    channels (0.4 of its time for 16 to 3, 0.95 for 32 to 3)."""
    side, (_, height, width, _) = len(w), x.shape
    parts = jnp.pad(jnp.einsum("nhwi,abio->nhwabo", x, w), ((0, 0), *((side // 2,) * 2,) * 2, *((0, 0),) * 3))
    total = reduce(jnp.add, (parts[:, a : a + height, b : b + width, a, b] for a in range(side) for b in range(side)))
    return lax.optimization_barrier(total)  # or XLA computes the sum anew for each use: 1.7 times slower than before


def _kernel_gradient(x: jax.Array, g: jax.Array, *, side: int) -> jax.Array:
    def of_piece(x: jax.Array, g: jax.Array) -> jax.Array:
        images, kernel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)  # as data: inside a loop XLA is slow at
        return lax.conv_general_dilated(images, kernel, (1, 1), pad, dimension_numbers=_LAYOUT)  # any other layout

    pad = ((side // 2, side // 2),) * 2
    piece = max(5, _ROWS // x.shape[1])
    total = of_piece(x[:piece], g[:piece])
    for i in range(piece, len(x), piece):
        total = total + of_piece(x[i : i + piece], g[i : i + piece])
    return total.transpose(1, 2, 0, 3)


_conv_p, _kernel_gradient_p = Primitive("plain_conv"), Primitive("plain_conv_kernel_gradient")

for _primitive, _run in ((_conv_p, _conv), (_kernel_gradient_p, _kernel_gradient)):
    _primitive.def_impl(jax.jit(_run, static_argnames="side") if _run is _kernel_gradient else jax.jit(_run))
    _primitive.def_abstract_eval(
        lambda *avals, _run=_run, **static: jax.core.ShapedArray(
            (shaped := jax.eval_shape(lambda *a: _run(*a, **static), *avals)).shape, shaped.dtype
        )
    )
    mlir.register_lowering(_primitive, mlir.lower_fun(_run, multiple_results=False))

ad.defbilinear(
    _conv_p,
    lambda g, x, w: conv(g, _turned(w)),
    lambda g, x, w: kernel_gradient(x, g, side=w.aval.shape[0]),
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda c, x, g, *, side: conv(g, _turned(c)),
    lambda c, x, g, *, side: conv(x, c),
)


def _conv_batched(args: Any, axes: Any) -> tuple[jax.Array, int]:
    """One kernel for all: the mapped axis joins the images. A kernel each: lax's own rule, which groups channels."""
    (x, w), (x_axis, w_axis) = args, axes
    if w_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        return conv(x.reshape(-1, *x.shape[2:]), w).reshape(*x.shape[:-1], w.shape[-1]), 0
    return jax.vmap(_conv, axes)(x, w), 0


def _kernel_gradient_batched(args: Any, axes: Any, *, side: int) -> tuple[jax.Array, int]:
    return jax.vmap(lambda x, g: _kernel_gradient(x, g, side=side), axes)(*args), 0


batching.primitive_batchers[_conv_p] = _conv_batched
batching.primitive_batchers[_kernel_gradient_p] = _kernel_gradient_batched
