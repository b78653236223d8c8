"""VGG networks (Simonyan & Zisserman, ICLR 2015) for CIFAR: no adaptive pooling, one or several small dense layers.

The default is VGG-16 with batch normalisation and a single dense layer, as in kuangliu's code and BackdoorBox. `plan`
is the number of convolutions per block: (1, 1, 2, 2, 2) is VGG-11, (2, 2, 2, 2, 2) VGG-13 and (2, 2, 4, 4, 4) VGG-19;
`hidden` are the units of the dense layers before the last. Convolutions have torchvision's names.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.models._variants import Numbers
from bdjax.types import Images, Key

SMALLEST = 32
VARIANTS = {
    "plan": Numbers(5, 5, 16), "normed": (True, False), "biased": (True, False), "hidden": Numbers(0, 3, 16384),
}  # fmt: skip


class Net(nn.Module):
    """14.7 million parameters. Five blocks of 3x3 convolutions, BN, ReLU and 2x2 max-pooling, then dense layers.

    The blocks have 1, 2, 4, 8 and 8 times `width` channels; their output (1x1 for 32x32 images) is flattened.
    """

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first block."""
    plan: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Number of convolutions per block."""
    normed: bool = True
    """Whether convolutions have batch normalisation."""
    biased: bool = True
    """Whether convolutions have biases."""
    hidden: tuple[int, ...] = ()
    """Units of the dense layers before the last, each with ReLU and dropout 0.5."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"block1" .. "block5", "dense1" .., "flat": [N, D]}."""
        features: dict[str, jax.Array] = {}
        x, layer = x.astype(self.dtype), 0
        for block, (count, times) in enumerate(zip(self.plan, (1, 2, 4, 8, 8), strict=True), 1):
            for _ in range(count):
                x = _layers.conv(self.width * times, self.dtype, bias=self.biased, name=f"features.{layer}")(x)
                if self.normed:
                    x = _layers.norm(train, self.dtype, self.axis_name, name=f"features.{layer + 1}")(x)
                x, layer = nn.relu(x), layer + (3 if self.normed else 2)
            x, layer = _layers.max_pool(x), layer + 1
            features[f"block{block}"] = x
        x = x.reshape(len(x), -1)
        for index, units in enumerate(self.hidden, 1):
            x = features[f"dense{index}"] = nn.relu(_layers.dense(units, self.dtype, name=f"hidden{index}")(x))
            x = _layers.dropout(x, 0.5, keys if train else None, index)
        features["flat"] = x
        return _layers.head(x, self.classes), features
