"""Simplified VGG of I-BAU (Zeng et al., ICLR 2022, Table 9): 6 convolutions, BN, ELU, dropout.

Three blocks of 32, 64 and 128 channels, each of two 3x3 convolutions (padding 1, conv-BN-ELU), a 2x2
max-pool and dropout 0.3, 0.4, 0.4; then flatten (2,048 values at 32x32) and one dense layer.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.types import Images, Key

SMALLEST = 8


class Net(nn.Module):
    """308,394 parameters on 32x32x3 with 10 classes (the convolutions have biases)."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 32
    """Channels of the first block."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"conv1" .. "conv6", "block1" .. "block3", "flat"}."""
        features = {}
        x = x.astype(self.dtype)
        layer = 0
        for block, rate in enumerate((0.3, 0.4, 0.4), 1):
            for _ in range(2):
                layer += 1
                x = _layers.conv(self.width * 2 ** (block - 1), self.dtype, bias=True)(x)
                x = features[f"conv{layer}"] = _layers.elu(_layers.norm(train, self.dtype, self.axis_name)(x))
            x = _layers.dropout(_layers.max_pool(x), rate, keys if train else None, block)
            features[f"block{block}"] = x
        x = features["flat"] = x.reshape(x.shape[0], -1)
        return _layers.head(x, self.classes), features
