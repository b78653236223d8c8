"""MobileNetV2 (Sandler et al., CVPR 2018), as in torchvision or in one of its forms for CIFAR.

The default is torchvision's, with a stem of stride 2; `stem` "plain" is chenyaofo's form for CIFAR with the same names
(stride 1 in the first convolution and the second stage). `form` selects the implementation of the blocks:

    torchvision   the first block has no expansion, ReLU6
    kuangliu      the first block has a 1x1 expansion, ReLU, and 1x1 convolutions in shortcuts that change the channels
    weiaicunzai   the first block has a 1x1 expansion, ReLU6, biases, a 1x1 first convolution that pads the image by 1,
                  and strides 2, 2, 2, 1, 1 (also in backdoor-toolbox)

Layers have torchvision's names, or kuangliu's where torchvision has no such layer.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _residual
from bdjax.models._variants import Numbers
from bdjax.types import Images, Key

SMALLEST = 8
VARIANTS = {
    "form": ("torchvision", "kuangliu", "weiaicunzai"), "stem": ("stride2", "plain"), "channels": Numbers(9, 9, 8192),
    "pool": _residual.POOLS,
}  # fmt: skip
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and stride of each stage."""
USUAL = (32, *(stage[1] for stage in _STAGES), 1280)
"""Channels of the first convolution, the stages and the last convolution."""


def scaled(width: int) -> tuple[int, ...]:
    """Return the USUAL channels scaled to a first convolution of `width` channels."""
    return tuple(max(1, channels * width // USUAL[0]) for channels in USUAL)


class Net(nn.Module):
    """3.5 million parameters with 1,000 classes; seventeen inverted residual blocks."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 32
    """Channels of the first convolution."""
    form: str = "torchvision"
    """Implementation of the blocks, see above."""
    stem: str = "stride2"
    """"stride2", or "plain" with the strides for CIFAR."""
    channels: tuple[int, ...] = ()
    """Channels in the order of USUAL, for other ratios (width multipliers round to multiples of 8); (): by `width`."""
    pool: int = 0
    """See `_residual.POOLS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage7", "last", "flat": [N, 1280]}."""
        biased, foreign = self.form == "weiaicunzai", self.form != "torchvision"
        channels = self.channels or scaled(self.width)

        def active(x: jax.Array) -> jax.Array:
            return nn.relu(x) if self.form == "kuangliu" else nn.relu6(x)

        def unit(x: jax.Array, out: int, kernel: int, conv: str, norm: str, stride: int = 1, groups: int = 1):
            x = _layers.conv(out, self.dtype, kernel, stride, biased, groups, conv)(x)
            return _layers.norm(train, self.dtype, self.axis_name, name=norm)(x)

        def block(x: jax.Array, name: str, expansion: int, out: int, stride: int) -> jax.Array:
            inside, y, layer = x.shape[-1] * expansion, x, 0
            if expansion > 1 or foreign:
                y, layer = active(unit(y, inside, 1, f"{name}.conv.0.0", f"{name}.conv.0.1")), 1
            depthwise = f"{name}.conv.{layer}"
            y = active(unit(y, inside, 3, f"{depthwise}.0", f"{depthwise}.1", stride, inside))
            y = unit(y, out, 1, f"{name}.conv.{layer + 1}", f"{name}.conv.{layer + 2}")
            if stride != 1:
                return y
            if x.shape[-1] == out:
                return x + y
            if self.form != "kuangliu":
                return y
            return y + unit(x, out, 1, f"{name}.shortcut.0", f"{name}.shortcut.1")

        def stride_of(stage: int, usual: int) -> int:
            if biased:
                return (1, 2, 2, 2, 1, 1, 1)[stage]
            return 1 if stage == 1 and self.stem == "plain" else usual

        features: dict[str, jax.Array] = {}
        x = x.astype(self.dtype)
        if biased:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        stride = 1 if biased or self.stem == "plain" else 2
        x = active(unit(x, channels[0], 1 if biased else 3, "features.0.0", "features.0.1", stride))
        features["stem"], number = x, 0
        for stage, (expansion, _, count, usual) in enumerate(_STAGES):
            for index in range(count):
                number += 1
                stride = stride_of(stage, usual) if index == 0 else 1
                x = block(x, f"features.{number}", expansion, channels[stage + 1], stride)
            features[f"stage{stage + 1}"] = x
        x = features["last"] = active(unit(x, channels[-1], 1, "features.18.0", "features.18.1"))
        if not foreign and not self.pool:
            x = features["flat"] = _layers.dropout(x.mean((1, 2)), 0.2, keys if train else None, 1)
            return _layers.head(x, self.classes), features
        return _residual.classify(x, self.classes, features, self.pool), features
