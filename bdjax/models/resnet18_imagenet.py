"""ResNet-18 (He et al., CVPR 2016) as torchvision has it: 7x7 first convolution at stride 2, then 3x3 max-pooling.

BackdoorBench's `resnet18` is this one, on small images too. `resnet18` is the form for CIFAR.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _residual
from bdjax.types import Images, Key

SMALLEST = 8


class Net(nn.Module):
    """11.7 million parameters with 1,000 classes. Blocks as in `resnet18`."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first stage."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage4", "flat": [N, 512]}."""

        def block(x: jax.Array, channels: int, stride: int) -> jax.Array:
            return _residual.basic(x, channels, stride, train, self.dtype, self.axis_name)

        features: dict[str, jax.Array] = {}
        x = _layers.conv(self.width, self.dtype, kernel=7, stride=2)(x.astype(self.dtype))
        x = nn.relu(_layers.norm(train, self.dtype, self.axis_name)(x))
        x = features["stem"] = _layers.window_max(x, 3, 2, padding=1)
        x = _residual.stages(x, block, self.width, features)
        return _residual.classify(x, self.classes, features), features
