"""ViT-B/16 (Dosovitskiy et al., ICLR 2021): base size, patches of 16 pixels, as torchvision has it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bdjax.models import _vit
from bdjax.types import Images, Key

SMALLEST = 16


class Net(nn.Module):
    """86.6 million parameters with 1,000 classes and 224x224 images."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 768
    """Of a token; a multiple of the twelve heads."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"patches", "block1" .. "block12", "flat": [N, 768]}."""
        return _vit.vit(x, 16, self)
