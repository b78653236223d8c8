"""Base of the residual networks (He et al., CVPR 2016) of any depth, with torchvision's layer names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _residual
from bdjax.models._variants import Numbers
from bdjax.types import Images, Key

SHORTCUTS = ("b", "a", "a-end")
"""Shortcut of a block that changes the shape. "b": 1x1 convolution and BN; "a": every second pixel, padded with zero
channels on both sides; "a-end": padded with zero channels at the end."""
VARIANTS = {
    "blocks": Numbers(1, 4, 64, 128),
    "bottleneck": (False, True),
    "inner": range(4097),
    "groups": range(1, 129),
    "shortcut": SHORTCUTS,
    "kernel": (3, 7),
    **_residual.VARIANTS,
}


class ResNet(nn.Module):
    """A stem, a stage for each entry of `blocks`, pooling, and a dense layer.

    Each stage after the first has twice the channels of the one before it and starts with stride 2. A basic block is
    conv-BN-ReLU-conv-BN with 3x3 convolutions; a bottleneck block has 1x1, 3x3 and 1x1 convolutions and four times the
    channels. Both add the shortcut and apply ReLU.
    """

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first stage."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Number of blocks of each stage."""
    bottleneck: bool = False
    """Whether blocks are bottleneck blocks instead of basic ones."""
    inner: int = 0
    """Channels of the 3x3 convolution of the first stage's bottleneck blocks; 0: `width`."""
    groups: int = 1
    """Channel groups of the 3x3 convolutions in bottleneck blocks."""
    shortcut: str = "b"
    """One of SHORTCUTS."""
    kernel: int = 3
    """Side of the first convolution's kernel."""
    stem: str = "plain"
    """One of `_residual.STEMS`."""
    pool: int = 0
    """See `_residual.POOLS`."""
    blur: bool = False
    """See `_residual.VARIANTS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .., "flat": [N, D]}."""

        def unit(x: jax.Array, channels: int, name: str, number: int, kernel: int, stride: int = 1, groups: int = 1):
            x = _layers.conv(channels, self.dtype, kernel, stride, groups=groups, name=f"{name}.conv{number}")(x)
            return _layers.norm(train, self.dtype, self.axis_name, name=f"{name}.bn{number}")(x)

        def strided(x: jax.Array, channels: int, name: str, number: int, stride: int, groups: int = 1) -> jax.Array:
            blur = self.blur and stride > 1
            y = nn.relu(unit(x, channels, name, number, 3, 1 if blur else stride, groups))
            return _residual.blur_pool(y) if blur else y

        def block(x: jax.Array, name: str, channels: int, stride: int) -> jax.Array:
            out = 4 * channels if self.bottleneck else channels
            if self.bottleneck:
                inner = channels * (self.inner or self.width) // self.width
                y = nn.relu(unit(x, inner, name, 1, 1))
                y = unit(strided(y, inner, name, 2, stride, self.groups), out, name, 3, 1)
            else:
                y = unit(strided(x, channels, name, 1, stride), channels, name, 2, 3)
            return nn.relu(y + self._short(x, out, stride, f"{name}.downsample", train))

        features: dict[str, jax.Array] = {}
        x = _residual.stem(x, self.width, self.dtype, self.stem, self.kernel, "conv1")
        x = nn.relu(_layers.norm(train, self.dtype, self.axis_name, name="bn1")(x))
        x = features["stem"] = _residual.stem_pooled(x, self.stem, self.blur)
        for stage, count in enumerate(self.blocks, 1):
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                x = block(x, f"layer{stage}.{index}", self.width * 2 ** (stage - 1), stride)
            features[f"stage{stage}"] = x
        return _residual.classify(x, self.classes, features, self.pool), features

    def _short(self, x: jax.Array, channels: int, stride: int, name: str, train: bool) -> jax.Array:
        if stride == 1 and x.shape[-1] == channels:
            return x
        if self.shortcut == "b":
            x = _layers.conv(channels, self.dtype, 1, stride, name=f"{name}.0")(x)
            return _layers.norm(train, self.dtype, self.axis_name, name=f"{name}.1")(x)
        more = channels - x.shape[-1]
        before = more // 2 if self.shortcut == "a" else 0
        return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (before, more - before)))
