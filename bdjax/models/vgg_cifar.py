"""The VGG networks (Simonyan & Zisserman, ICLR 2015) in their forms for CIFAR: no 7x7 mean, small dense layers or one.

By default VGG-16 with batch normalisation and a single dense layer, as kuangliu's and BackdoorBox's. `plan` has the
convolutions of each block, so that (1, 1, 2, 2, 2) is VGG-11, (2, 2, 2, 2, 2) VGG-13 and (2, 2, 4, 4, 4) VGG-19;
`hidden` the units of the dense layers before the last. Convolutions are named as torchvision names them.
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
    """14.7 million parameters. Five blocks of 3x3 convolutions, BN, ReLU and 2x2 max-pooling, of 1, 2, 4, 8 and 8 times
    `width` channels; what is left of the image is flattened (one place at 32x32)."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first block."""
    plan: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Convolutions of each block."""
    normed: bool = True
    """With batch normalisation."""
    biased: bool = True
    """The convolutions have biases."""
    hidden: tuple[int, ...] = ()
    """Units of the dense layers before the last, each with ReLU and dropout 0.5."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"block1" .. "block5", "dense1" .., "flat": [N, D]}."""
        features: dict[str, jax.Array] = {}
        x, place = x.astype(self.dtype), 0
        for block, (count, times) in enumerate(zip(self.plan, (1, 2, 4, 8, 8), strict=True), 1):
            for _ in range(count):
                x = _layers.conv(self.width * times, self.dtype, bias=self.biased, name=f"features.{place}")(x)
                if self.normed:
                    x = _layers.norm(train, self.dtype, self.axis_name, name=f"features.{place + 1}")(x)
                x, place = nn.relu(x), place + (3 if self.normed else 2)
            x, place = _layers.max_pool(x), place + 1
            features[f"block{block}"] = x
        x = x.reshape(len(x), -1)
        for index, units in enumerate(self.hidden, 1):
            x = features[f"dense{index}"] = nn.relu(_layers.dense(units, self.dtype, name=f"hidden{index}")(x))
            x = _layers.dropout(x, 0.5, keys if train else None, index)
        features["flat"] = x
        return _layers.head(x, self.classes), features
