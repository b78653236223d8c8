"""Layers that the models share, with PyTorch's conventions where published code depends on them."""

from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.models import cpu
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
    """Create a square convolution, zero-padded by kernel // 2 on every side.

    Args:
      features: number of output channels.
      dtype: dtype of the computation.
      kernel: side of the kernel.
      stride: stride along both axes.
      bias: whether the layer has a bias.
      groups: number of channel groups.
      name: name of the layer; None: Flax's default.
      same: pad like TensorFlow's "SAME" instead, unevenly for stride 2.

    Returns:
      The layer.
    """
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
    """Convolve like `lax.conv_general_dilated`, for odd kernels with a padding of kernel // 2.

    On a CPU, :mod:`bdjax.models.cpu` is used where it supports the shapes, unless it is disabled.

    Args:
      x: images [N, H, W, I].
      kernel: [K, K, I, O].
      strides: stride along both axes.
      padding: padding of both axes, as for lax.
      **others: further arguments of lax, for convolutions that `bdjax.models.cpu` does not support.

    Returns:
      Images [N, H', W', O].
    """
    stride, side = max(strides), len(kernel)
    if cpu.enabled() and stride <= 2:
        if stride == 1 or side == 1:
            return convolution.conv(x[:, ::stride, ::stride], kernel)
        if strided.is_supported(x, kernel):
            return strided.conv(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **others)


def norm(
    train: bool, dtype: Any, axis_name: str | None, epsilon: float = 1e-5, name: str | None = None
) -> nn.BatchNorm:
    """Create a batch normalisation with PyTorch's momentum 0.1 (decay 0.9).

    Args:
      train: whether to use batch statistics.
      dtype: dtype of the computation.
      axis_name: mapped axis over which batch statistics are averaged, or None.
      epsilon: constant added to the variance.
      name: name of the layer; None: Flax's default.

    Returns:
      The layer.
    """
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
    """Exponential linear unit whose derivative is computed from its value: one exponential instead of two."""
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


@elu.defjvp
def _elu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = elu(*primals)
    return y, jnp.where(y > 0, 1, y + 1) * tangents[0]


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling of stride 2 of [N, H, W, C]; an odd last row or column is dropped.

    Among equal maxima the gradient goes to the first in row-major order, as in PyTorch: on a constant
    patch (a white square) an even split would change the gradient that a defense uses.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    top = _first_max(x[:, ::2, ::2], x[:, ::2, 1::2])
    bottom = _first_max(x[:, 1::2, ::2], x[:, 1::2, 1::2])
    return _first_max(top, bottom)


def window_max(x: jax.Array, window: int, stride: int, padding: int = 0, ceil: bool = False) -> jax.Array:
    """Max-pooling with a square window, as PyTorch's; ties are resolved as in :func:`max_pool`.

    Args:
      x: images [N, H, W, C].
      window: side of the window.
      stride: stride along both axes.
      padding: padding by -inf on every side.
      ceil: whether a last window may exceed the edge, if it starts inside (PyTorch's `ceil_mode`).

    Returns:
      Images [N, H', W', C].
    """
    sides, counts = [], []
    for size in x.shape[1:3]:
        span = size + 2 * padding - window
        count = (-(-span // stride) if ceil else span // stride) + 1
        if ceil and (count - 1) * stride >= size + padding:
            count -= 1
        sides.append((padding, max(padding, (count - 1) * stride + window - size - padding)))
        counts.append(count)
    x = jnp.pad(x, ((0, 0), *sides, (0, 0)), constant_values=-jnp.inf)
    rows, columns = ((count - 1) * stride + 1 for count in counts)
    offsets = [(top, left) for top in range(window) for left in range(window)]
    return reduce(_first_max, (x[:, a : a + rows : stride, b : b + columns : stride] for a, b in offsets))


def mean_pool(x: jax.Array) -> jax.Array:
    """2x2 mean-pooling of stride 2 of [N, H, W, C]; an odd last row or column is dropped."""
    count, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def window_mean(x: jax.Array, window: int) -> jax.Array:
    """Mean-pooling of [N, H, W, C] over adjacent squares of side `window`; an incomplete last square is dropped.

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
    """Adaptive average pooling of [N, H, W, C] to [N, side, side, C], as PyTorch's."""
    for axis in (1, 2):
        size = x.shape[axis]
        if side != size:
            x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(pooling_matrix(size, side), x.dtype), (axis, 1)), -1, axis)
    return x


def pooling_matrix(length: int, bins: int) -> np.ndarray:
    """Return adaptive average pooling along one axis as a matrix, float32 [bins, length].

    The bins are nearly equal and overlap as in PyTorch's `adaptive_avg_pool`.
    """
    matrix = np.zeros((bins, length), np.float32)
    for i in range(bins):
        start, end = i * length // bins, -(-(i + 1) * length // bins)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a >= b, a, b)


def dropout(x: jax.Array, rate: float, keys: Key | None, index: int) -> jax.Array:
    """Inverted dropout with one key per image, so that the draw does not depend on how a batch is split.

    Args:
      x: activations [N, ...].
      rate: dropout rate in [0, 1).
      keys: random keys [N]; None: no dropout.
      index: number of the layer, folded into the keys.

    Returns:
      Activations [N, ...].
    """
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def dense(features: int, dtype: Any, name: str | None = None) -> nn.Dense:
    """Create a dense layer other than the last one.

    Args:
      features: number of outputs.
      dtype: dtype of the computation.
      name: name of the layer; None: Flax's default.

    Returns:
      The layer.
    """
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.he_normal(), name=name)


def head(x: jax.Array, classes: int) -> jax.Array:
    """Apply the last dense layer, in at least float32 for a stable softmax."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    return nn.Dense(classes, dtype=dtype, name="head")(x.astype(dtype))
