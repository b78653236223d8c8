"""The modified ResNet of CLIP (Radford et al., ICML 2021).

Three convolutions first, strides by mean-pooling, and attention in place of the global mean. Layers have the names of
OpenAI's state dict, without the prefix "visual.".
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.models._clip_towers import attend


class ClipResnet(nn.Module):
    """ResNet of bottleneck blocks with 2x2 mean-poolings as strides; one attention layer pools the last map."""

    width: int
    """Channels of the first stage; the last map has 32 times as many."""
    depths: tuple[int, ...]
    """Blocks of the four stages."""
    heads: int
    dimension: int
    """Dimension of the embedding."""
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Images [N, H, W, C] -> (embeddings [N, D], {"stem", "stage1" ..., "flat": [N, 32 width]})."""
        features: dict[str, jax.Array] = {}
        x = x.astype(self.dtype)
        for index, (channels, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = nn.relu(self._convolve(x, channels, 3, stride, f"conv{index}", f"bn{index}", train))
        x = features["stem"] = _layers.mean_pool(x)
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                stride = 2 if stage and block == 0 else 1
                x = self._bottleneck(x, self.width << stage, stride, f"layer{stage + 1}.{block}", train)
            features[f"stage{stage + 1}"] = x
        x, features["flat"] = self._attention_pool(x)
        return x.astype(jnp.float32), features

    def _convolve(
        self, x: jax.Array, channels: int, kernel: int, stride: int, name: str, norm: str, train: bool
    ) -> jax.Array:
        x = _layers.conv(channels, self.dtype, kernel, stride, name=name)(x)
        return _layers.norm(train, self.dtype, self.axis_name, name=norm)(x)

    def _bottleneck(self, x: jax.Array, channels: int, stride: int, name: str, train: bool) -> jax.Array:
        y = nn.relu(self._convolve(x, channels, 1, 1, f"{name}.conv1", f"{name}.bn1", train))
        y = nn.relu(self._convolve(y, channels, 3, 1, f"{name}.conv2", f"{name}.bn2", train))
        if stride > 1:
            x, y = _layers.mean_pool(x), _layers.mean_pool(y)
        y = self._convolve(y, 4 * channels, 1, 1, f"{name}.conv3", f"{name}.bn3", train)
        if stride > 1 or x.shape[-1] != 4 * channels:
            x = self._convolve(x, 4 * channels, 1, 1, f"{name}.downsample.0", f"{name}.downsample.1", train)
        return nn.relu(x + y)

    def _attention_pool(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean of all positions attends to all positions; returns the embedding, and its input [N, 32 width]."""
        width = x.shape[-1]
        x = x.reshape(len(x), -1, width)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1)
        scale = nn.initializers.normal(width**-0.5)
        position = self.param("attnpool.positional_embedding", scale, (x.shape[1], width))
        x = x + position.astype(x.dtype)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=scale, name=f"attnpool.{name}")

        query, key, value = dense(width, "q_proj")(x[:, :1]), dense(width, "k_proj")(x), dense(width, "v_proj")(x)
        flat = attend(query, key, value, self.heads)[:, 0]
        return dense(self.dimension, "c_proj")(flat), flat
