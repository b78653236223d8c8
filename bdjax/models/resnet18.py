"""ResNet-18 (He et al., CVPR 2016) with the CIFAR stem: 3x3 first convolution, no initial pooling."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _residual
from bdjax.types import Images, Key

SMALLEST = 8
VARIANTS = _residual.VARIANTS


class Net(nn.Module):
    """11.2 million parameters. Blocks conv-BN-ReLU-conv-BN, plus shortcut (1x1 conv-BN), ReLU."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first stage."""
    stem: str = "plain"
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
        x = _residual.stem(x, self.width, self.dtype, self.stem)
        x = nn.relu(_layers.norm(train, self.dtype, self.axis_name)(x))
        x = features["stem"] = _residual.stem_pooled(x, self.stem, self.blur)
        x = _residual.stages(x, block, self.width, features)
        return _residual.classify(x, self.classes, features, self.pool), features
