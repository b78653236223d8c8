"""Layers that the models share, with PyTorch's conventions where the papers' releases depend on them."""

from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.models.cpu import convolution, strided
from bdjax.types import Key


def conv(
    features: int,
    dtype: Any,
    kernel: int = 3,
    stride: int = 1,
    bias: bool = False,
    groups: int = 1,
    name: str | None = None,
    same: bool = False,
) -> nn.Conv:
    """Square convolution, zero-padded by kernel // 2 on every side; `same` pads stride 2 unevenly, as TensorFlow."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding="SAME" if same else kernel // 2,
        use_bias=bias,
        feature_group_count=groups,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
        conv_general_dilated=convolve if groups == 1 and kernel % 2 and not same else None,
    )


def convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **others: Any) -> jax.Array:
    """`lax.conv_general_dilated` for odd kernels padded by their half; on a CPU with derivatives quick there."""
    stride, side = max(strides), len(kernel)
    if jax.default_backend() == "cpu" and stride <= 2:
        if stride == 1 or side == 1:
            return convolution.conv(x[:, ::stride, ::stride], kernel)
        if strided.fits(x, kernel):
            return strided.strided(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **others)


def norm(
    train: bool, dtype: Any, axis_name: str | None, epsilon: float = 1e-5, name: str | None = None
) -> nn.BatchNorm:
    """Batch normalisation with PyTorch's momentum 0.1 (decay 0.9); `axis_name` averages over devices."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=epsilon,
        dtype=dtype,
        name=name,
        axis_name=axis_name if train else None,
    )


@jax.custom_jvp
def elu(x: jax.Array) -> jax.Array:
    """The exponential linear unit, whose derivatives come from its value: one exponential instead of two."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


@elu.defjvp
def _elu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = elu(*primals)
    return y, jnp.where(y > 0, 1, y + 1) * tangents[0]


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling, stride 2, of [N, H, W, C]; an odd last row or column is dropped.

    Among equal maxima the gradient goes to the first in row-major order, as in PyTorch: on a constant
    patch (a white square) an even split would change the gradient that a defense sees.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    top = _first_max(x[:, ::2, ::2], x[:, ::2, 1::2])
    bottom = _first_max(x[:, 1::2, ::2], x[:, 1::2, 1::2])
    return _first_max(top, bottom)


def window_max(x: jax.Array, window: int, stride: int, padding: int = 0, ceil: bool = False) -> jax.Array:
    """Square max-pooling of [N, H, W, C] as PyTorch's, of any window; ties as in :func:`max_pool`.

    `padding` on every side never wins. `ceil`: a last window may hang over the edge, if it begins inside.
    """
    sides, wanted = [], []
    for size in x.shape[1:3]:
        room = size + 2 * padding - window
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= size + padding:
            count -= 1
        sides.append((padding, max(padding, (count - 1) * stride + window - size - padding)))
        wanted.append(count)
    x = jnp.pad(x, ((0, 0), *sides, (0, 0)), constant_values=-jnp.inf)
    rows, columns = ((count - 1) * stride + 1 for count in wanted)
    places = [(top, left) for top in range(window) for left in range(window)]
    return reduce(_first_max, (x[:, a : a + rows : stride, b : b + columns : stride] for a, b in places))


def mean_pool(x: jax.Array) -> jax.Array:
    """2x2 mean-pooling, stride 2, of [N, H, W, C]; an odd last row or column is dropped."""
    count, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def window_mean(x: jax.Array, window: int) -> jax.Array:
    """Means of [N, H, W, C] over squares of `window` pixels side by side; what is left over at the end is dropped.

    Raises InputError when the images are smaller than one square.
    """
    count, height, width, channels = x.shape
    if min(height, width) < window:
        raise InputError(
            f"an average over {window}x{window} places needs as many, and the network's last layer leaves "
            f"{height}x{width} of these images. Use larger images (--size) or another --pool."
        )
    x = x[:, : height // window * window, : width // window * window]
    return x.reshape(count, height // window, window, width // window, window, channels).mean((2, 4))


def adaptive_mean(x: jax.Array, side: int) -> jax.Array:
    """Means of [N, H, W, C] over `side` x `side` nearly equal boxes, [N, side, side, C]; they overlap as PyTorch's."""
    for axis in (1, 2):
        size = x.shape[axis]
        share = np.zeros((side, size), np.float32)
        for i in range(side):
            first, last = i * size // side, -(-(i + 1) * size // side)
            share[i, first:last] = 1 / (last - first)
        if side != size:
            x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(share, x.dtype), (axis, 1)), -1, axis)
    return x


def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a >= b, a, b)


def dropout(x: jax.Array, rate: float, keys: Key | None, index: int) -> jax.Array:
    """Inverted dropout with one key an image, so that its draw does not depend on how a batch is split.

    Args: x [N, ...]; rate in [0, 1); keys [N], or None to leave x as it is; index tells the layers apart.
    """
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def dense(features: int, dtype: Any, name: str | None = None) -> nn.Dense:
    """A dense layer that is not the last."""
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.he_normal(), name=name)


def head(x: jax.Array, classes: int) -> jax.Array:
    """The last dense layer; at least float32 whatever the activations are, for a stable softmax."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    return nn.Dense(classes, dtype=dtype, name="head")(x.astype(dtype))
