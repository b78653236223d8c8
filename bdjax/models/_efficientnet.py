"""Base of the EfficientNets (Tan & Le, ICML 2019 and 2021), as in torchvision, with its layer names."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _mobile
from bdjax.types import Images, Key

Stage = tuple[bool, int, int, int, int, int]
"""Fused (one 3x3 convolution replaces the first two of a block), kernel, expansion, stride, channels, blocks."""
_STOCHASTIC_DEPTH = 0.2  # drop rate of the last block's branch in training; grows linearly with depth


class EfficientNet(nn.Module):
    """Stages of inverted residual blocks with squeeze-and-excitation; fused blocks have none."""

    STAGES: ClassVar[tuple[Stage, ...]]
    STEM: ClassVar[int]
    """Usual number of channels of the first convolution."""
    LAST: ClassVar[int]
    """Channels of the last convolution."""
    DROPOUT: ClassVar[float]
    """Dropout rate before the last layer."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 24
    """Channels of the first convolution."""
    epsilon: int = 3
    """See `_mobile.VARIANTS`."""
    padding: str = "plain"
    """See `_mobile.VARIANTS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .., "last", "flat": [N, D]}."""
        drop_keys, index = keys if train else None, 0
        depth = sum(stage[-1] for stage in self.STAGES)

        def scaled(channels: int) -> int:
            return max(1, channels * self.width // self.STEM)

        def block(x: jax.Array, name: str, spec: Stage, stride: int, out: int) -> jax.Array:
            fused, kernel, expansion = spec[:3]
            before, inside = x, x.shape[-1] * expansion
            if fused and expansion == 1:
                x = _mobile.unit(x, out, 3, f"{name}.0", train, self, stride=stride, active=_mobile.swish)
            elif fused:
                x = _mobile.unit(x, inside, 3, f"{name}.0", train, self, stride=stride, active=_mobile.swish)
                x = _mobile.unit(x, out, 1, f"{name}.1", train, self)
            else:
                layer = 0
                if expansion > 1:
                    x, layer = _mobile.unit(x, inside, 1, f"{name}.0", train, self, active=_mobile.swish), 1
                options: dict[str, Any] = {"stride": stride, "groups": inside, "active": _mobile.swish}
                x = _mobile.unit(x, inside, kernel, f"{name}.{layer}", train, self, **options)
                squeeze = max(1, before.shape[-1] // 4)
                x = _mobile.squeeze_excite(x, squeeze, f"{name}.{layer + 1}", self.dtype, _mobile.swish, nn.sigmoid)
                x = _mobile.unit(x, out, 1, f"{name}.{layer + 2}", train, self)
            if stride != 1 or x.shape != before.shape:
                return x
            ones = jnp.ones((len(x), 1, 1, 1), x.dtype)
            return before + x * _layers.dropout(ones, _STOCHASTIC_DEPTH * index / depth, drop_keys, index)

        features: dict[str, jax.Array] = {}
        x, swish = x.astype(self.dtype), _mobile.swish
        x = features["stem"] = _mobile.unit(x, scaled(self.STEM), 3, "features.0", train, self, stride=2, active=swish)
        for stage, spec in enumerate(self.STAGES, 1):
            *_, stride, channels, count = spec
            for number in range(count):
                name = f"features.{stage}.{number}.block"
                x = block(x, name, spec, stride if number == 0 else 1, scaled(channels))
                index += 1
            features[f"stage{stage}"] = x
        name = f"features.{len(self.STAGES) + 1}"
        x = features["last"] = _mobile.unit(x, scaled(self.LAST), 1, name, train, self, active=swish)
        x = features["flat"] = _layers.dropout(x.mean((1, 2)), self.DROPOUT, drop_keys, depth)
        return _layers.head(x, self.classes), features
