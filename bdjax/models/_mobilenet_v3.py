"""Base of the MobileNetV3 models (Howard et al., ICCV 2019), as in torchvision, with its layer names.

Deviations from torchvision, in training only:

- Running statistics have momentum 0.1 instead of 0.01.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _mobile
from bdjax.types import Images, Key

Block = tuple[int, int, int, int, bool, int]
"""Kernel, expanded channels, channels of the squeeze (0: none), channels, hard swish, stride."""


class MobileNetV3(nn.Module):
    """Inverted residual blocks, some with squeeze-and-excitation, a last convolution, and two dense layers."""

    BLOCKS: ClassVar[tuple[Block, ...]]
    LAST: ClassVar[tuple[int, int]]
    """Channels of the last convolution, and of the dense layer after it."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 16
    """Channels of the first convolution."""
    epsilon: int = 3
    """See `_mobile.VARIANTS`."""
    padding: str = "plain"
    """See `_mobile.VARIANTS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "block1" .., "last", "flat": [N, D]}."""

        def scaled(channels: int) -> int:
            return max(1, channels * self.width // 16)

        def block(x: jax.Array, index: int, spec: Block) -> jax.Array:
            kernel, inside, squeeze, out, hard, stride = spec
            active, inside, before, index_in_block = nn.hard_swish if hard else nn.relu, scaled(inside), x, 0
            name = f"features.{index}.block"
            if index > 1:  # the first block has no expansion
                x = _mobile.unit(x, inside, 1, f"{name}.0", train, self, active=active)
                index_in_block = 1
            x = _mobile.unit(
                x, inside, kernel, f"{name}.{index_in_block}", train, self, stride=stride, groups=inside, active=active
            )
            if squeeze:
                index_in_block += 1
                x = _mobile.squeeze_excite(
                    x, scaled(squeeze), f"{name}.{index_in_block}", self.dtype, nn.relu, nn.hard_sigmoid
                )
            x = _mobile.unit(x, scaled(out), 1, f"{name}.{index_in_block + 1}", train, self)
            return x + before if stride == 1 and x.shape == before.shape else x

        features: dict[str, jax.Array] = {}
        x = _mobile.unit(x.astype(self.dtype), scaled(16), 3, "features.0", train, self, stride=2, active=nn.hard_swish)
        features["stem"] = x
        for index, spec in enumerate(self.BLOCKS, 1):
            x = features[f"block{index}"] = block(x, index, spec)
        last, dense = map(scaled, self.LAST)
        name = f"features.{len(self.BLOCKS) + 1}"
        x = features["last"] = _mobile.unit(x, last, 1, name, train, self, active=nn.hard_swish)
        x = nn.hard_swish(_layers.dense(dense, self.dtype, name="classifier.0")(x.mean((1, 2))))
        x = features["flat"] = _layers.dropout(x, 0.2, keys if train else None, 1)
        return _layers.head(x, self.classes), features
