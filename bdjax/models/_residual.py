"""Parts that the residual networks share: stem, stages of blocks, pooling and the last layer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bdjax.models import _layers
from bdjax.types import Images

STEMS = ("plain", "max", "stride2", "stride2-max")
"""Stride of the first convolution (1, or 2 for "stride2"), with 3x3 max-pooling of stride 2 after it for "max"."""
POOLS = range(33)
"""Window of the mean-pooling of the last feature, which is then flattened; 0: global mean."""
VARIANTS = {"stem": STEMS, "pool": POOLS, "blur": (False, True)}
"""`blur`: max-pooling and 3x3 convolutions of stride 2 have stride 1 and :func:`blur_pool` (after the ReLU)."""


def stages(
    x: jax.Array, block: Callable[[jax.Array, int, int], jax.Array], width: int, features: dict[str, jax.Array]
) -> jax.Array:
    """Apply four stages of two blocks, the first at full size and the others at stride 2.

    Args:
      x: activations [N, H, W, C].
      block: `block(x, channels, stride) -> x`.
      width: channels of the first stage; each next stage has twice as many.
      features: receives the output of each stage.

    Returns:
      Output of the last stage.
    """
    for stage in range(1, 5):
        for index in range(2):
            x = block(x, width * 2 ** (stage - 1), 2 if stage > 1 and index == 0 else 1)
        features[f"stage{stage}"] = x
    return x


def stem(x: Images, width: int, dtype: Any, kind: str = "plain", kernel: int = 3, name: str | None = None) -> jax.Array:
    """Apply the first convolution.

    Args:
      x: images [N, H, W, C].
      width: number of output channels.
      dtype: dtype of the computation.
      kind: one of STEMS, which determines the stride.
      kernel: side of the kernel.
      name: name of the layer; None: Flax's default.

    Returns:
      Activations [N, H', W', width].
    """
    stride = 2 if kind.startswith("stride2") else 1
    return _layers.conv(width, dtype, kernel=kernel, stride=stride, name=name)(x.astype(dtype))


def stem_pooled(x: jax.Array, kind: str, blur: bool = False) -> jax.Array:
    """Apply the pooling after the activation of the first convolution, if the stem has one.

    Args:
      x: activations [N, H, W, C].
      kind: one of STEMS.
      blur: see VARIANTS.

    Returns:
      Activations [N, H', W', C].
    """
    if not kind.endswith("max"):
        return x
    return blur_pool(_layers.window_max(x, 3, 1, padding=1)) if blur else _layers.window_max(x, 3, 2, padding=1)


def blur_pool(x: jax.Array) -> jax.Array:
    """Blur-pooling of stride 2 (Zhang, ICML 2019) of [N, H, W, C], as in timm's `resnetblur` networks.

    The filter is 1/4, 1/2, 1/4 along both axes, with reflection at the edges.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    for axis in (1, 2):
        size = (x.shape[axis] - 1) // 2
        first, middle, last = (lax.slice_in_dim(x, start, start + 2 * size - 1, 2, axis) for start in range(3))
        x = (first + 2 * middle + last) / 4
    return x


def classify(x: jax.Array, classes: int, features: dict[str, jax.Array], pool: int = 0) -> jax.Array:
    """Apply mean-pooling and the last dense layer.

    Args:
      x: activations [N, H, W, C].
      classes: number of classes.
      features: receives "flat", the input of the dense layer, and "pooled", the feature before flattening.
      pool: see POOLS.

    Returns:
      Logits [N, classes].
    """
    if pool:
        x = features["pooled"] = _layers.window_mean(x, pool)
        x = features["flat"] = x.reshape(len(x), -1)
    else:
        x = features["flat"] = x.mean((1, 2))
    return _layers.head(x, classes)


def shortcut(x: jax.Array, channels: int, stride: int, dtype: Any) -> jax.Array:
    """Apply a 1x1 convolution where the shape changes, else the identity.

    Args:
      x: activations [N, H, W, C].
      channels: number of output channels.
      stride: stride along both axes.
      dtype: dtype of the computation.

    Returns:
      Activations [N, H', W', channels].
    """
    if stride == 1 and x.shape[-1] == channels:
        return x
    layer = nn.Conv(
        channels, (1, 1), strides=stride, padding=0, use_bias=False, dtype=dtype, conv_general_dilated=_layers.convolve
    )
    return layer(x)


def basic(
    x: jax.Array, channels: int, stride: int, train: bool, dtype: Any, axis_name: str | None, blur: bool = False
) -> jax.Array:
    """Apply a basic block: conv-BN-ReLU-conv-BN plus shortcut (1x1 conv-BN where the shape changes), then ReLU.

    Args:
      x: activations [N, H, W, C].
      channels: number of output channels.
      stride: stride of the first convolution.
      train: whether to use batch statistics.
      dtype: dtype of the computation.
      axis_name: mapped axis over which batch statistics are averaged, or None.
      blur: see VARIANTS.

    Returns:
      Activations [N, H', W', channels].
    """

    def norm(x: jax.Array) -> jax.Array:
        return _layers.norm(train, dtype, axis_name)(x)

    blur = blur and stride > 1
    y = nn.relu(norm(_layers.conv(channels, dtype, stride=1 if blur else stride)(x)))
    y = blur_pool(y) if blur else y
    y = norm(_layers.conv(channels, dtype)(y))
    short = shortcut(x, channels, stride, dtype)
    return nn.relu(y + (short if short is x else norm(short)))
