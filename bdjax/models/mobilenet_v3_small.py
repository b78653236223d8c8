"""MobileNetV3-Small (Howard et al., ICCV 2019), as torchvision has it; layers are named as its modules.

**Deviation** from torchvision in training alone: running statistics move by a tenth a step, not by a hundredth.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _mobile
from bdjax.types import Images, Key

SMALLEST = 8
_BLOCKS = (  # kernel, expanded channels, of the squeeze (0: none), channels, hard swish, stride
    (3, 16, 8, 16, False, 2),
    (3, 72, 0, 24, False, 2),
    (3, 88, 0, 24, False, 1),
    (5, 96, 24, 40, True, 2),
    (5, 240, 64, 40, True, 1),
    (5, 240, 64, 40, True, 1),
    (5, 120, 32, 48, True, 1),
    (5, 144, 40, 48, True, 1),
    (5, 288, 72, 96, True, 2),
    (5, 576, 144, 96, True, 1),
    (5, 576, 144, 96, True, 1),
)


class Net(nn.Module):
    """2.5 million parameters with 1,000 classes; eleven inverted residual blocks."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 16
    """Channels of the first convolution."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "block1" .. "block11", "last", "flat": [N, 1024]}."""

        def scaled(channels: int) -> int:
            return max(1, channels * self.width // 16)

        def block(x: jax.Array, name: str, spec: tuple[int, int, int, int, bool, int]) -> jax.Array:
            kernel, inside, squeeze, out, hard, stride = spec
            active, inside, before, place = nn.hard_swish if hard else nn.relu, scaled(inside), x, 0
            if spec is not _BLOCKS[0]:  # it expands nothing
                x = _mobile.unit(x, inside, 1, f"{name}.0", train, self, active=active)
                place = 1
            x = _mobile.unit(
                x, inside, kernel, f"{name}.{place}", train, self, stride=stride, groups=inside, active=active
            )
            if squeeze:
                place += 1
                x = _mobile.squeezed(x, scaled(squeeze), f"{name}.{place}", self.dtype, nn.relu, nn.hard_sigmoid)
            x = _mobile.unit(x, scaled(out), 1, f"{name}.{place + 1}", train, self)
            return x + before if stride == 1 and x.shape == before.shape else x

        features: dict[str, jax.Array] = {}
        x = _mobile.unit(x.astype(self.dtype), scaled(16), 3, "features.0", train, self, stride=2, active=nn.hard_swish)
        features["stem"] = x
        for index, spec in enumerate(_BLOCKS, 1):
            x = features[f"block{index}"] = block(x, f"features.{index}.block", spec)
        x = features["last"] = _mobile.unit(x, scaled(576), 1, "features.12", train, self, active=nn.hard_swish)
        x = nn.hard_swish(_layers.dense(scaled(1024), self.dtype, name="classifier.0")(x.mean((1, 2))))
        x = features["flat"] = _layers.dropout(x, 0.2, keys if train else None, 1)
        return _layers.head(x, self.classes), features
