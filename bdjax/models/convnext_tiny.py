"""ConvNeXt-Tiny (Liu et al., CVPR 2022), as in torchvision, with its layer names.

Deviations from torchvision, in training only:

- No stochastic depth.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.types import Images, Key

SMALLEST = 32
_STAGES = ((1, 3), (2, 3), (4, 9), (8, 3))  # (channels as a multiple of the stem's, blocks)
_EPSILON, _SCALE = 1e-6, 1e-6


class Net(nn.Module):
    """28.6 million parameters with 1,000 classes.

    A stem of 4x4 patches; blocks of a 7x7 depthwise convolution, layer normalisation and a perceptron four times as
    wide, scaled per channel, with a residual connection; 2x2 convolutions of stride 2 between stages.
    """

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 96
    """Channels of the first convolution."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage4", "flat": [N, 768]}."""

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name=name)(x)

        def patches(x: jax.Array, channels: int, side: int, name: str) -> jax.Array:
            layer = nn.Conv(channels, (side, side), side, padding="VALID", dtype=self.dtype, name=name)
            return layer(x)

        def block(x: jax.Array, name: str) -> jax.Array:
            channels = x.shape[-1]
            y = _layers.conv(channels, self.dtype, 7, bias=True, groups=channels, name=f"{name}.block.0")(x)
            y = nn.Dense(4 * channels, dtype=self.dtype, name=f"{name}.block.3")(norm(y, f"{name}.block.2"))
            y = nn.Dense(channels, dtype=self.dtype, name=f"{name}.block.5")(nn.gelu(y, approximate=False))
            scale = self.param(f"{name}.layer_scale", nn.initializers.constant(_SCALE), (channels, 1, 1))
            return x + y * scale[:, 0, 0].astype(y.dtype)

        features: dict[str, jax.Array] = {}
        x = features["stem"] = norm(patches(x.astype(self.dtype), self.width, 4, "features.0.0"), "features.0.1")
        for stage, (times, count) in enumerate(_STAGES):
            if stage:
                x = norm(x, f"features.{2 * stage}.0")
                x = patches(x, self.width * times, 2, f"features.{2 * stage}.1")
            for index in range(count):
                x = block(x, f"features.{2 * stage + 1}.{index}")
            features[f"stage{stage + 1}"] = x
        x = features["flat"] = norm(x.mean((1, 2)), "classifier.0")
        return _layers.head(x, self.classes), features
