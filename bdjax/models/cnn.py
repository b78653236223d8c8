"""A small convolutional network for small images: three blocks conv-pool-BN-ELU of 16, 32 and 64 channels."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.types import Images, Key

SMALLEST = 8


class Net(nn.Module):
    """33,658 parameters on 32x32x1 with 10 classes. Pooling precedes BN and ELU, which are slow on a CPU."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"block1": [N, H/2, W/2, 16], ..., "flat": [N, D]}."""
        features = {}
        x = x.astype(self.dtype)
        for block, channels in enumerate((16, 32, 64), 1):
            x = _layers.max_pool(_layers.conv(channels, self.dtype)(x))
            x = features[f"block{block}"] = _layers.elu(_layers.norm(train, self.dtype, self.axis_name)(x))
        x = features["flat"] = x.reshape(x.shape[0], -1)
        return _layers.head(x, self.classes), features
