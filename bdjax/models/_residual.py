"""The frame that the 18-layer residual networks share: stem, four stages of two blocks, mean, dense."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bdjax.models import _layers
from bdjax.types import Images

STEMS = ("plain", "max", "stride2", "stride2-max")
"""The stride of the first convolution, 1 or 2, and whether 3x3 max-pooling of stride 2 follows its activation."""
POOLS = range(33)
"""Side of the squares that the last feature is averaged over, then flattened; 0: one mean over all places."""
VARIANTS = {"stem": STEMS, "pool": POOLS, "blur": (False, True)}
"""`blur`: strides of 2 become stride 1 and :func:`blurred`, in max-pooling and in 3x3 convolutions after their ReLU."""


def stages(
    x: jax.Array, block: Callable[[jax.Array, int, int], jax.Array], width: int, features: dict[str, jax.Array]
) -> jax.Array:
    """Four stages of two blocks, the first at full size and the others at stride 2; each is a feature.

    They have `width` channels, twice, four and eight times as many.
    """
    for stage in range(1, 5):
        for index in range(2):
            x = block(x, width * 2 ** (stage - 1), 2 if stage > 1 and index == 0 else 1)
        features[f"stage{stage}"] = x
    return x


def stem(x: Images, width: int, dtype: Any, kind: str = "plain", kernel: int = 3, name: str | None = None) -> jax.Array:
    """The first convolution, of the stride that `kind` says."""
    stride = 2 if kind.startswith("stride2") else 1
    return _layers.conv(width, dtype, kernel=kernel, stride=stride, name=name)(x.astype(dtype))


def stem_pooled(x: jax.Array, kind: str, blur: bool = False) -> jax.Array:
    """What follows the activation of the first convolution."""
    if not kind.endswith("max"):
        return x
    return blurred(_layers.window_max(x, 3, 1, padding=1)) if blur else _layers.window_max(x, 3, 2, padding=1)


def blurred(x: jax.Array) -> jax.Array:
    """Every second pixel of [N, H, W, C] after the weights 1/4, 1/2, 1/4 along both axes, mirrored at the edges.

    Blur-pooling (Zhang, ICML 2019), as timm's `resnetblur` networks have it.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    for axis in (1, 2):
        size = (x.shape[axis] - 1) // 2
        first, middle, last = (lax.slice_in_dim(x, at, at + 2 * size - 1, 2, axis) for at in range(3))
        x = (first + 2 * middle + last) / 4
    return x


def classify(x: jax.Array, classes: int, features: dict[str, jax.Array], pool: int = 0) -> jax.Array:
    """Global mean (or :data:`POOLS`), then the dense layer; "flat" is the vector in between, "pooled" before it."""
    if pool:
        x = features["pooled"] = _layers.window_mean(x, pool)
        x = features["flat"] = x.reshape(len(x), -1)
    else:
        x = features["flat"] = x.mean((1, 2))
    return _layers.head(x, classes)


def shortcut(x: jax.Array, channels: int, stride: int, dtype: Any) -> jax.Array:
    """A 1x1 convolution where the shape changes, else the identity."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    layer = nn.Conv(
        channels, (1, 1), strides=stride, padding=0, use_bias=False, dtype=dtype, conv_general_dilated=_layers.convolve
    )
    return layer(x)


def basic(
    x: jax.Array, channels: int, stride: int, train: bool, dtype: Any, axis_name: str | None, blur: bool = False
) -> jax.Array:
    """The block conv-BN-ReLU-conv-BN, plus shortcut (1x1 conv-BN where the shape changes), ReLU."""

    def norm(x: jax.Array) -> jax.Array:
        return _layers.norm(train, dtype, axis_name)(x)

    blur = blur and stride > 1
    y = nn.relu(norm(_layers.conv(channels, dtype, stride=1 if blur else stride)(x)))
    y = blurred(y) if blur else y
    y = norm(_layers.conv(channels, dtype)(y))
    short = shortcut(x, channels, stride, dtype)
    return nn.relu(y + (short if short is x else norm(short)))
