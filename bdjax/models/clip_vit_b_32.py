"""Image encoder of CLIP ViT-B/32 (Radford et al., ICML 2021, arXiv:2103.00020) with a linear head on its features."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.models import _layers
from bdjax.models._clip_towers import ACTIVATIONS, vision_transformer
from bdjax.types import Images, Key

SMALLEST = 32
VARIANTS = {"depth": range(1, 65), "heads": range(1, 65), "activation": ACTIVATIONS}


class Net(nn.Module):
    """88 million parameters with 10 classes and 224x224 images."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 768
    """Dimension of a token, a multiple of `heads`."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of attention heads."""
    activation: str = "quick_gelu"
    """Activation of the perceptrons."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"patches", "block1" ..., "flat": the embedding}."""
        if self.width % self.heads:
            raise InputError(f"a vision transformer's width must be a multiple of {self.heads}, got {self.width}.")
        dimension = max(1, self.width * 2 // 3)  # 512 for a width of 768
        embedding, features = vision_transformer(self, x, 32, dimension)
        features["flat"] = embedding.astype(self.dtype)
        return _layers.head(embedding, self.classes), features
