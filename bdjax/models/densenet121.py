"""DenseNet-121 (Huang et al., CVPR 2017), as in torchvision, with its layer names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.types import Images, Key

SMALLEST = 29
_BLOCKS = (6, 12, 24, 16)


class Net(nn.Module):
    """8.0 million parameters with 1,000 classes; each of 58 dense layers appends `width` / 2 channels."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first convolution."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "block1" .. "block4", "flat": [N, 1024]}."""
        growth = max(1, self.width // 2)

        def active(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(_layers.norm(train, self.dtype, self.axis_name, name=name)(x))

        features: dict[str, jax.Array] = {}
        x = _layers.conv(self.width, self.dtype, kernel=7, stride=2, name="features.conv0")(x.astype(self.dtype))
        x = features["stem"] = _layers.window_max(active(x, "features.norm0"), 3, 2, padding=1)
        for block, count in enumerate(_BLOCKS, 1):
            for layer in range(1, count + 1):
                name = f"features.denseblock{block}.denselayer{layer}"
                y = _layers.conv(4 * growth, self.dtype, kernel=1, name=f"{name}.conv1")(active(x, f"{name}.norm1"))
                y = _layers.conv(growth, self.dtype, name=f"{name}.conv2")(active(y, f"{name}.norm2"))
                x = jnp.concatenate([x, y], -1)
            features[f"block{block}"] = x
            if block < len(_BLOCKS):
                name = f"features.transition{block}"
                x = active(x, f"{name}.norm")
                x = _layers.conv(x.shape[-1] // 2, self.dtype, kernel=1, name=f"{name}.conv")(x)
                x = _layers.mean_pool(x)
        x = features["flat"] = active(x, "features.norm5").mean((1, 2))
        return _layers.head(x, self.classes), features
