"""VGG-16 with batch normalisation (Simonyan & Zisserman, ICLR 2015), as torchvision has it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bdjax.models import _vgg
from bdjax.types import Images, Key

SMALLEST = _vgg.SMALLEST


class Net(nn.Module):
    """138.4 million parameters with 1,000 classes."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first block."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"block1" .. "block5", "pool", "dense1", "dense2", "flat"}."""
        return _vgg.vgg(x, 16, True, train, keys, self)
