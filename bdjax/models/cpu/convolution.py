"""Convolution whose derivatives of every order are plain convolutions, for XLA on a CPU.

XLA:CPU runs the derivatives that JAX emits for a convolution (exchanged or dilated dimensions) on a slow path: inside
`lax.scan` 10 to 50 times slower than outside (jax issue 12868), and never by its fast bfloat16 kernels. Where the
stride is 1, the padding keeps the size and the kernel is odd and square, both derivatives are plain:

    y      = conv(x, w)
    dL/dx  = conv(g, w turned by 180 degrees, its channels exchanged)
    dL/dw  = kernel_gradient(x, g), a convolution over the batch

and the derivatives of `kernel_gradient` are `conv` again, so the pair is closed under differentiation. For stride 2 a
third function is needed (:mod:`bdjax.models.cpu.strided`).
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
    if winograd.pays(x, w.shape):
        return winograd.convolved(x, w)
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)


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
        return lax.conv_general_dilated(images, kernel, (1, 1), pad, dimension_numbers=LAYOUT)  # any other layout

    if side == 1:
        return (x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1]))[None, None]
    if winograd.pays(x, (side, side, x.shape[-1], g.shape[-1]), least=2**12):
        return winograd.kernel_gradient(x, g)
    pad = ((side // 2, side // 2),) * 2
    piece = max(5, _ROWS // x.shape[1])
    total = of_piece(x[:piece], g[:piece])
    for i in range(piece, len(x), piece):
        total = total + of_piece(x[i : i + piece], g[i : i + piece])
    return total.transpose(1, 2, 0, 3)


def bilinear(name: str, run: Callable, static: str = "", images: bool = False) -> Primitive:
    """A primitive that `run` computes; its caller says the derivatives. `static`: the name of a parameter, if any.

    Under vmap: `images` says that the first operand is images and the other a kernel; with one kernel for all the
    mapped axis joins the images. Else, or with a kernel each: the rules of `run`'s operations.
    """
    primitive = Primitive(name)

    def mapped(args: Any, axes: Any, **given: Any) -> tuple[jax.Array, int]:
        (x, w), (axis, w_axis) = args, axes
        if not images or w_axis is not None:
            return jax.vmap(partial(run, **given), axes)(x, w), 0
        x = jnp.moveaxis(x, axis, 0)
        out = primitive.bind(x.reshape(-1, *x.shape[2:]), w, **given)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0

    primitive.def_impl(jax.jit(run, static_argnames=static or None))
    primitive.def_abstract_eval(
        lambda *avals, **given: jax.core.ShapedArray(
            (shaped := jax.eval_shape(partial(run, **given), *avals)).shape, shaped.dtype
        )
    )
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    batching.primitive_batchers[primitive] = mapped
    return primitive


_conv_p = bilinear("plain_conv", _conv, images=True)
_kernel_gradient_p = bilinear("plain_conv_kernel_gradient", _kernel_gradient, "side")

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
