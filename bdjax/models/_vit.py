"""Base of the vision transformers (Dosovitskiy et al., ICLR 2021) as in torchvision, with its layer names.

The position embedding is for one size of images.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.models import _layers
from bdjax.types import Images, Key

_EPSILON = 1e-6
VARIANTS = {"depth": range(1, 65), "heads": range(1, 65)}


class Vit(nn.Module):
    """Vision transformer with a class token.

    Patches of PATCH x PATCH pixels are embedded in `width` dimensions. Each of `depth` blocks has multi-head attention
    and a perceptron of 4 `width` units (GELU), with layer normalisation before and a residual connection around each.
    """

    PATCH: ClassVar[int]
    """Side of a patch in pixels."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 768
    """Dimension of a token, a multiple of `heads`."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of attention heads."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"patches", "block1" .. "block12", "flat": [N, 768]}."""
        if self.width % self.heads:
            raise InputError(f"a vision transformer's width must be a multiple of {self.heads}, got {self.width}.")
        features: dict[str, jax.Array] = {}

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name=name)(x)

        side = (self.PATCH, self.PATCH)
        x = nn.Conv(self.width, side, side, padding="VALID", dtype=self.dtype, name="conv_proj")(x.astype(self.dtype))
        x = x.reshape(len(x), -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, self.width)), x], 1)
        position = self.param("encoder.pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = features["patches"] = x + position.astype(x.dtype)
        for block in range(self.depth):
            name = f"encoder.layers.encoder_layer_{block}"
            x = x + _attention(norm(x, f"{name}.ln_1"), f"{name}.self_attention", self)
            y = nn.Dense(4 * self.width, dtype=self.dtype, name=f"{name}.mlp.0")(norm(x, f"{name}.ln_2"))
            x = x + nn.Dense(self.width, dtype=self.dtype, name=f"{name}.mlp.3")(nn.gelu(y, approximate=False))
            features[f"block{block + 1}"] = x
        x = features["flat"] = norm(x, "encoder.ln")[:, 0]
        return _layers.head(x, self.classes), features


def _attention(x: jax.Array, name: str, net: Any) -> jax.Array:
    """Multi-head attention softmax(Q Kᵀ / sqrt(d)) V with a dense output layer."""
    parts = nn.Dense(3 * net.width, dtype=net.dtype, name=f"{name}.in_proj")(x)
    query, key, value = jnp.moveaxis(parts.reshape(*x.shape[:2], 3, net.heads, net.width // net.heads), 2, 0)
    score = jnp.einsum("nqhd,nkhd->nhqk", query, key) / (net.width // net.heads) ** 0.5
    heads = jnp.einsum("nhqk,nkhd->nqhd", nn.softmax(score), value)
    return nn.Dense(net.width, dtype=net.dtype, name=f"{name}.out_proj")(heads.reshape(x.shape))
