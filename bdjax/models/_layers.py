"""Layers that the models share, with PyTorch's conventions where the papers' releases depend on them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _conv
from bdjax.types import Key


def conv(features: int, dtype: Any, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv:
    """Square convolution, zero-padded by kernel // 2 on every side ("SAME" would pad stride 2 unevenly)."""
    plain = stride == 1 and kernel % 2 == 1 and jax.default_backend() == "cpu"
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=_plain if plain else None,
    )


def _plain(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return _conv.conv(x, kernel)


def norm(train: bool, dtype: Any, axis_name: str | None) -> nn.BatchNorm:
    """Batch normalisation with PyTorch's momentum 0.1 (decay 0.9); `axis_name` averages over devices."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
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


def head(x: jax.Array, classes: int) -> jax.Array:
    """The last dense layer; at least float32 whatever the activations are, for a stable softmax."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    return nn.Dense(classes, dtype=dtype, name="head")(x.astype(dtype))
