"""The frame of the VGG networks (Simonyan & Zisserman, ICLR 2015) as torchvision has them, for images of any size.

Layers are named as torchvision names its modules. Between convolutions and dense layers stands a 7x7 adaptive mean,
which enlarges what small images leave.
"""

from typing import Any

import flax.linen as nn
import jax

from bdjax.models import _layers
from bdjax.types import Images, Key

SMALLEST = 32
PLANS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each block, by the number of weight layers."""
_SIDE = 7


def vgg(
    x: Images, layers: int, normed: bool, train: bool, keys: Key | None, net: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Images -> (logits, features) of the module `net`, whose fields are classes, dtype, axis_name and width.

    Five blocks of 3x3 convolutions with biases, ReLU (before it BN, if `normed`) and 2x2 max-pooling, of 1, 2, 4, 8
    and 8 times `width` channels; then two dense layers of 64 times `width` with dropout 0.5, and the last.
    """
    features: dict[str, jax.Array] = {}
    x, place = x.astype(net.dtype), 0
    for block, (count, times) in enumerate(zip(PLANS[layers], (1, 2, 4, 8, 8), strict=True), 1):
        for _ in range(count):
            x = _layers.conv(net.width * times, net.dtype, bias=True, name=f"features.{place}")(x)
            if normed:
                x = _layers.norm(train, net.dtype, net.axis_name, name=f"features.{place + 1}")(x)
            x, place = nn.relu(x), place + (3 if normed else 2)
        x, place = _layers.max_pool(x), place + 1
        features[f"block{block}"] = x
    x = features["pool"] = _layers.adaptive_mean(x, _SIDE)
    x = x.reshape(x.shape[0], -1)
    for index, name in enumerate(("classifier.0", "classifier.3"), 1):
        x = features[f"dense{index}"] = nn.relu(_layers.dense(64 * net.width, net.dtype, name=name)(x))
        x = _layers.dropout(x, 0.5, keys if train else None, index)
    features["flat"] = x
    return _layers.head(x, net.classes), features
