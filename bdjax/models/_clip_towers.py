"""The transformers of CLIP (Radford et al., ICML 2021): the vision transformer and the text transformer.

Layers have the names of OpenAI's state dict, without the prefix "visual." of the image encoder.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.errors import InputError

ACTIVATIONS = ("quick_gelu", "gelu")


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation x sigmoid(1.702 x) of the Gaussian error linear unit."""
    return x * jax.nn.sigmoid(1.702 * x)


class ClipVit(nn.Module):
    """Vision transformer with a class token, layer normalisation before the blocks, and a projection without bias."""

    width: int
    depth: int
    heads: int
    patch: int
    dimension: int
    """Dimension of the embedding."""
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Images [N, H, W, C] -> (embeddings [N, D], {"patches", "block1" ..., "flat": [N, width]})."""
        return vision_transformer(self, x, self.patch, self.dimension)


def vision_transformer(net: Any, x: jax.Array, patch: int, dimension: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Apply the vision transformer; its layers become layers of `net`.

    Args:
      net: the Linen module that calls, with `width`, `depth`, `heads`, `activation` and `dtype`.
      x: images [N, H, W, C].
      patch: side of a patch in pixels.
      dimension: dimension of the embedding.

    Returns:
      (embeddings float32 [N, dimension], {"patches", "block1" ..., "flat": [N, width]}).
    """
    features: dict[str, jax.Array] = {}
    embed = nn.Conv(net.width, (patch, patch), (patch, patch), "VALID", use_bias=False, dtype=net.dtype, name="conv1")
    x = embed(x.astype(net.dtype)).reshape(len(x), -1, net.width)
    scale = nn.initializers.normal(net.width**-0.5)
    token = net.param("class_embedding", scale, (net.width,)).astype(x.dtype)
    x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, net.width)), x], 1)
    position = net.param("positional_embedding", scale, (x.shape[1], net.width))
    x = features["patches"] = _norm(net.dtype, "ln_pre")(x + position.astype(x.dtype))
    for block in range(net.depth):
        x = features[f"block{block + 1}"] = _block(x, f"transformer.resblocks.{block}", net)
    x = features["flat"] = _norm(net.dtype, "ln_post")(x[:, 0])
    projection = net.param("proj", scale, (net.width, dimension))
    return (x @ projection.astype(x.dtype)).astype(jnp.float32), features


class ClipText(nn.Module):
    """Transformer over tokens with a causal mask; the embedding is read at the end-of-text token."""

    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    dimension: int
    """Dimension of the embedding."""
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 [N, context] -> embeddings [N, D]. The end-of-text token is the largest number in its row."""
        if tokens.shape[1] != self.context:
            raise InputError(f"captions have {tokens.shape[1]} tokens; the text encoder takes {self.context}.")
        embedding = self.param("token_embedding", nn.initializers.normal(0.02), (self.vocabulary, self.width))
        position = self.param("positional_embedding", nn.initializers.normal(0.01), (self.context, self.width))
        x = (embedding[tokens] + position).astype(self.dtype)
        for block in range(self.depth):
            x = _block(x, f"transformer.resblocks.{block}", self, causal=True)
        x = _norm(self.dtype, "ln_final")(x)
        end = x[jnp.arange(len(x)), tokens.argmax(1)]
        scale = nn.initializers.normal(self.width**-0.5)
        projection = self.param("text_projection", scale, (self.width, self.dimension))
        return (end @ projection.astype(end.dtype)).astype(jnp.float32)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, heads: int, causal: bool = False) -> jax.Array:
    """Multi-head attention softmax(Q Kᵀ / sqrt(d)) V, with the softmax in float32.

    Args:
      query: [N, Q, width].
      key: [N, K, width].
      value: [N, K, width].
      heads: number of heads.
      causal: whether a position sees only itself and the positions before it; Q = K then.

    Returns:
      [N, Q, width].
    """
    width = query.shape[-1]
    query, key, value = (part.reshape(*part.shape[:2], heads, width // heads) for part in (query, key, value))
    score = jnp.einsum("nqhd,nkhd->nhqk", query, key).astype(jnp.float32) / (width // heads) ** 0.5
    if causal:
        score = jnp.where(jnp.tri(score.shape[-1], dtype=bool), score, -jnp.inf)
    mixed = jnp.einsum("nhqk,nkhd->nqhd", nn.softmax(score).astype(value.dtype), value)
    return mixed.reshape(*mixed.shape[:2], width)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


def _block(x: jax.Array, name: str, net: Any, causal: bool = False) -> jax.Array:
    """Attention and a perceptron of 4 widths, with layer normalisation before and a residual connection around each."""
    y = nn.Dense(3 * net.width, dtype=net.dtype, name=f"{name}.attn.in_proj")(_norm(net.dtype, f"{name}.ln_1")(x))
    query, key, value = jnp.split(y, 3, -1)
    y = attend(query, key, value, net.heads, causal)
    x = x + nn.Dense(net.width, dtype=net.dtype, name=f"{name}.attn.out_proj")(y)
    y = nn.Dense(4 * net.width, dtype=net.dtype, name=f"{name}.mlp.c_fc")(_norm(net.dtype, f"{name}.ln_2")(x))
    y = quick_gelu(y) if net.activation == "quick_gelu" else nn.gelu(y, approximate=False)
    return x + nn.Dense(net.width, dtype=net.dtype, name=f"{name}.mlp.c_proj")(y)
