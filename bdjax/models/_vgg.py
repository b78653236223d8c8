"""Base of the VGG networks (Simonyan & Zisserman, ICLR 2015) as in torchvision, with its layer names.

Between the convolutions and the dense layers is 7x7 adaptive average pooling, which up-samples the small features of
small images.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.types import Images, Key

SMALLEST = 32
PLANS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Number of convolutions per block, by the number of weight layers."""
_SIDE = 7


class Vgg(nn.Module):
    """Five blocks of 3x3 convolutions, two dense layers of 64 `width` units with dropout 0.5, and the last layer.

    A block has convolutions with biases, each followed by BN (if NORMED) and ReLU, and 2x2 max-pooling; the blocks have
    1, 2, 4, 8 and 8 times `width` channels.
    """

    LAYERS: ClassVar[int]
    """Key of PLANS."""
    NORMED: ClassVar[bool]
    """Whether convolutions have batch normalisation."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first block."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"block1" .. "block5", "pool", "dense1", "dense2", "flat"}."""
        features: dict[str, jax.Array] = {}
        x, layer = x.astype(self.dtype), 0
        for block, (count, times) in enumerate(zip(PLANS[self.LAYERS], (1, 2, 4, 8, 8), strict=True), 1):
            for _ in range(count):
                x = _layers.conv(self.width * times, self.dtype, bias=True, name=f"features.{layer}")(x)
                if self.NORMED:
                    x = _layers.norm(train, self.dtype, self.axis_name, name=f"features.{layer + 1}")(x)
                x, layer = nn.relu(x), layer + (3 if self.NORMED else 2)
            x, layer = _layers.max_pool(x), layer + 1
            features[f"block{block}"] = x
        x = features["pool"] = _layers.adaptive_mean(x, _SIDE)
        x = x.reshape(x.shape[0], -1)
        for index, name in enumerate(("classifier.0", "classifier.3"), 1):
            x = features[f"dense{index}"] = nn.relu(_layers.dense(64 * self.width, self.dtype, name=name)(x))
            x = _layers.dropout(x, 0.5, keys if train else None, index)
        features["flat"] = x
        return _layers.head(x, self.classes), features
