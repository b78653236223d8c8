"""The frame of the vision transformers (Dosovitskiy et al., ICLR 2021), base size, as torchvision has them.

Layers are named as torchvision names its modules. The position embedding belongs to one size of images.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.models import _layers
from bdjax.types import Images

_BLOCKS, _HEADS, _EPSILON = 12, 12, 1e-6


def vit(x: Images, patch: int, net: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Images -> (logits, features) of the module `net`, whose fields are classes, dtype and width.

    Patches of `patch` x `patch` pixels become vectors of `width`; a class token comes first; twelve blocks of
    attention with twelve heads and of a perceptron four times as wide (GELU), each normalised before and added.
    """
    if net.width % _HEADS:
        raise InputError(f"a vision transformer's width must be a multiple of {_HEADS}, got {net.width}.")
    features: dict[str, jax.Array] = {}

    def norm(x: jax.Array, name: str) -> jax.Array:
        return nn.LayerNorm(epsilon=_EPSILON, dtype=net.dtype, name=name)(x)

    x = nn.Conv(
        net.width, (patch, patch), strides=patch, padding="VALID", dtype=net.dtype, name="conv_proj"
    )(x.astype(net.dtype))  # fmt: skip
    x = x.reshape(len(x), -1, net.width)
    token = net.param("class_token", nn.initializers.zeros, (1, 1, net.width))
    x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, net.width)), x], 1)
    place = net.param("encoder.pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], net.width))
    x = features["patches"] = x + place.astype(x.dtype)
    for block in range(_BLOCKS):
        name = f"encoder.layers.encoder_layer_{block}"
        x = x + _attention(norm(x, f"{name}.ln_1"), f"{name}.self_attention", net)
        y = nn.Dense(4 * net.width, dtype=net.dtype, name=f"{name}.mlp.0")(norm(x, f"{name}.ln_2"))
        x = x + nn.Dense(net.width, dtype=net.dtype, name=f"{name}.mlp.3")(nn.gelu(y, approximate=False))
        features[f"block{block + 1}"] = x
    x = features["flat"] = norm(x, "encoder.ln")[:, 0]
    return _layers.head(x, net.classes), features


def _attention(x: jax.Array, name: str, net: Any) -> jax.Array:
    """softmax(Q Kᵀ / sqrt(d)) V of each head, side by side, through a dense layer."""
    parts = nn.Dense(3 * net.width, dtype=net.dtype, name=f"{name}.in_proj")(x)
    query, key, value = jnp.moveaxis(parts.reshape(*x.shape[:2], 3, _HEADS, net.width // _HEADS), 2, 0)
    score = jnp.einsum("nqhd,nkhd->nhqk", query, key) / (net.width // _HEADS) ** 0.5
    found = jnp.einsum("nhqk,nkhd->nqhd", nn.softmax(score), value)
    return nn.Dense(net.width, dtype=net.dtype, name=f"{name}.out_proj")(found.reshape(x.shape))
