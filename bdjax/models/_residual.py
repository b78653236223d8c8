"""The frame that the 18-layer residual networks share: CIFAR stem, four stages of two blocks, mean, dense."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bdjax.models import _layers
from bdjax.types import Images


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


def stem(x: Images, width: int, dtype: Any) -> jax.Array:
    """The CIFAR stem: one 3x3 convolution at stride 1, no pooling."""
    return _layers.conv(width, dtype)(x.astype(dtype))


def classify(x: jax.Array, classes: int, features: dict[str, jax.Array]) -> jax.Array:
    """Global mean, then the dense layer; "flat" is the vector in between."""
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


def basic(x: jax.Array, channels: int, stride: int, train: bool, dtype: Any, axis_name: str | None) -> jax.Array:
    """The block conv-BN-ReLU-conv-BN, plus shortcut (1x1 conv-BN where the shape changes), ReLU."""

    def norm(x: jax.Array) -> jax.Array:
        return _layers.norm(train, dtype, axis_name)(x)

    y = nn.relu(norm(_layers.conv(channels, dtype, stride=stride)(x)))
    y = norm(_layers.conv(channels, dtype)(y))
    short = shortcut(x, channels, stride, dtype)
    return nn.relu(y + (short if short is x else norm(short)))
