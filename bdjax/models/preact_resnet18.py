"""Pre-activation ResNet-18 (He et al., ECCV 2016) with the CIFAR stem, as in BackdoorBench.

Deviations from the paper, shared with the public CIFAR implementations:

- No BN-ReLU after the last stage.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _residual
from bdjax.types import Images, Key

SMALLEST = 8
VARIANTS = {"pool": _residual.POOLS}


class Net(nn.Module):
    """11.2 million parameters. Blocks BN-ReLU-conv-BN-ReLU-conv; the shortcut starts after the first ReLU."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first stage."""
    pool: int = 0
    """See `_residual.POOLS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage4", "flat": [N, 512]}."""

        def active(x: jax.Array) -> jax.Array:
            return nn.relu(_layers.norm(train, self.dtype, self.axis_name)(x))

        def block(x: jax.Array, channels: int, stride: int) -> jax.Array:
            y = active(x)
            changes = stride != 1 or x.shape[-1] != channels
            short = _residual.shortcut(y, channels, stride, self.dtype) if changes else x
            y = _layers.conv(channels, self.dtype, stride=stride)(y)
            return _layers.conv(channels, self.dtype)(active(y)) + short

        features: dict[str, jax.Array] = {}
        x = features["stem"] = _residual.stem(x, self.width, self.dtype)
        x = _residual.stages(x, block, self.width, features)
        return _residual.classify(x, self.classes, features, self.pool), features
