"""The frame of the EfficientNets (Tan & Le, ICML 2019 and 2021), as torchvision has them; named as its modules."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _mobile
from bdjax.types import Images, Key

Stage = tuple[bool, int, int, int, int, int]
"""Fused (one 3x3 convolution for the first two of a block), kernel, expansion, stride, channels, blocks."""
_LEFT_OUT = 0.2  # of the blocks' branches in training: the last one's share, growing linearly


class EfficientNet(nn.Module):
    """Stages of inverted residual blocks with squeeze-and-excitation, some of them fused and without."""

    STAGES: ClassVar[tuple[Stage, ...]]
    STEM: ClassVar[int]
    """Channels of the first convolution, usually."""
    LAST: ClassVar[int]
    """Channels of the last convolution."""
    DROPOUT: ClassVar[float]
    """Before the last layer."""

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
                at = 0
                if expansion > 1:
                    x, at = _mobile.unit(x, inside, 1, f"{name}.0", train, self, active=_mobile.swish), 1
                given: dict[str, Any] = {"stride": stride, "groups": inside, "active": _mobile.swish}
                x = _mobile.unit(x, inside, kernel, f"{name}.{at}", train, self, **given)
                squeeze = max(1, before.shape[-1] // 4)
                x = _mobile.squeezed(x, squeeze, f"{name}.{at + 1}", self.dtype, _mobile.swish, nn.sigmoid)
                x = _mobile.unit(x, out, 1, f"{name}.{at + 2}", train, self)
            if stride != 1 or x.shape != before.shape:
                return x
            whole = jnp.ones((len(x), 1, 1, 1), x.dtype)
            return before + x * _layers.dropout(whole, _LEFT_OUT * index / depth, drop_keys, index)

        features: dict[str, jax.Array] = {}
        x, swish = x.astype(self.dtype), _mobile.swish
        x = features["stem"] = _mobile.unit(x, scaled(self.STEM), 3, "features.0", train, self, stride=2, active=swish)
        for stage, spec in enumerate(self.STAGES, 1):
            *_, stride, channels, count = spec
            for place in range(count):
                name = f"features.{stage}.{place}.block"
                x = block(x, name, spec, stride if place == 0 else 1, scaled(channels))
                index += 1
            features[f"stage{stage}"] = x
        name = f"features.{len(self.STAGES) + 1}"
        x = features["last"] = _mobile.unit(x, scaled(self.LAST), 1, name, train, self, active=swish)
        x = features["flat"] = _layers.dropout(x.mean((1, 2)), self.DROPOUT, drop_keys, depth)
        return _layers.head(x, self.classes), features
