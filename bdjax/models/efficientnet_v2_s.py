"""EfficientNetV2-S (Tan & Le, ICML 2021), as torchvision has it; layers are named as its modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _mobile
from bdjax.types import Images, Key

SMALLEST = 8
VARIANTS = _mobile.VARIANTS
_STAGES = (  # fused, expansion, stride, channels, blocks; all kernels are 3x3
    (True, 1, 1, 24, 2),
    (True, 4, 2, 48, 4),
    (True, 4, 2, 64, 4),
    (False, 4, 2, 128, 6),
    (False, 6, 1, 160, 9),
    (False, 6, 2, 256, 15),
)
_DEPTH = sum(stage[-1] for stage in _STAGES)
_LEFT_OUT = 0.2  # of the blocks' branches in training: the last one's share, growing linearly


class Net(nn.Module):
    """21.5 million parameters with 1,000 classes; 40 blocks, the first ten with one 3x3 convolution for two."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 24
    """Channels of the first convolution."""
    epsilon: int = 3
    """Of `_mobile.VARIANTS`."""
    padding: str = "plain"
    """Of `_mobile.VARIANTS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage6", "last", "flat": [N, 1280]}."""
        drop_keys, index = keys if train else None, 0

        def scaled(channels: int) -> int:
            return max(1, channels * self.width // 24)

        def block(x: jax.Array, name: str, fused: bool, expansion: int, stride: int, out: int) -> jax.Array:
            before, inside = x, x.shape[-1] * expansion
            if fused and expansion == 1:
                x = _mobile.unit(x, out, 3, f"{name}.0", train, self, stride=stride, active=_mobile.swish)
            elif fused:
                x = _mobile.unit(x, inside, 3, f"{name}.0", train, self, stride=stride, active=_mobile.swish)
                x = _mobile.unit(x, out, 1, f"{name}.1", train, self)
            else:
                x = _mobile.unit(x, inside, 1, f"{name}.0", train, self, active=_mobile.swish)
                x = _mobile.unit(
                    x, inside, 3, f"{name}.1", train, self, stride=stride, groups=inside, active=_mobile.swish
                )
                squeeze = max(1, before.shape[-1] // 4)
                x = _mobile.squeezed(x, squeeze, f"{name}.2", self.dtype, _mobile.swish, nn.sigmoid)
                x = _mobile.unit(x, out, 1, f"{name}.3", train, self)
            if stride != 1 or x.shape != before.shape:
                return x
            whole = jnp.ones((len(x), 1, 1, 1), x.dtype)
            return before + x * _layers.dropout(whole, _LEFT_OUT * index / _DEPTH, drop_keys, index)

        features: dict[str, jax.Array] = {}
        x = _mobile.unit(x.astype(self.dtype), scaled(24), 3, "features.0", train, self, stride=2, active=_mobile.swish)
        features["stem"] = x
        for stage, (fused, expansion, stride, channels, count) in enumerate(_STAGES, 1):
            for place in range(count):
                name = f"features.{stage}.{place}.block"
                x = block(x, name, fused, expansion, stride if place == 0 else 1, scaled(channels))
                index += 1
            features[f"stage{stage}"] = x
        x = features["last"] = _mobile.unit(x, scaled(1280), 1, "features.7", train, self, active=_mobile.swish)
        x = features["flat"] = _layers.dropout(x.mean((1, 2)), 0.2, drop_keys, _DEPTH)
        return _layers.head(x, self.classes), features
