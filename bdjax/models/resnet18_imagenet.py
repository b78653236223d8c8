"""ResNet-18 (He et al., CVPR 2016) as in torchvision: 7x7 first convolution of stride 2, then 3x3 max-pooling.

BackdoorBench's `resnet18` is this model, also for small images. bdjax's `resnet18` is the form for CIFAR.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _residual
from bdjax.types import Images, Key

SMALLEST = 8
VARIANTS = _residual.VARIANTS


class Net(nn.Module):
    """11.7 million parameters with 1,000 classes. Blocks as in `resnet18`."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first stage."""
    stem: str = "stride2-max"
    """One of `_residual.STEMS`."""
    pool: int = 0
    """See `_residual.POOLS`."""
    blur: bool = False
    """See `_residual.VARIANTS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage4", "flat": [N, 512]}."""

        def block(x: jax.Array, channels: int, stride: int) -> jax.Array:
            return _residual.basic(x, channels, stride, train, self.dtype, self.axis_name, self.blur)

        features: dict[str, jax.Array] = {}
        x = _residual.stem(x, self.width, self.dtype, self.stem, kernel=7)
        x = nn.relu(_layers.norm(train, self.dtype, self.axis_name)(x))
        x = features["stem"] = _residual.stem_pooled(x, self.stem, self.blur)
        x = _residual.stages(x, block, self.width, features)
        return _residual.classify(x, self.classes, features, self.pool), features
