"""SENet-18 (Hu et al., CVPR 2018) with the CIFAR stem, as in kuangliu's implementation, with its layer names.

Blocks are pre-activation blocks; `preact` False selects basic blocks.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _mobile, _residual
from bdjax.types import Images, Key

SMALLEST = 8
VARIANTS = {"preact": (True, False), "reduction": range(1, 65), "pool": _residual.POOLS}


class Net(nn.Module):
    """11.3 million parameters. Four stages of two residual blocks with squeeze-and-excitation."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first stage."""
    preact: bool = True
    """Whether blocks are BN-ReLU-conv-BN-ReLU-conv; else conv-BN-ReLU-conv-BN with BN in the shortcut, then ReLU."""
    reduction: int = 16
    """Channel reduction of the hidden layer in squeeze-and-excitation."""
    pool: int = 0
    """See `_residual.POOLS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage4", "flat": [N, 512]}."""

        def conv(x: jax.Array, channels: int, name: str, kernel: int = 3, stride: int = 1) -> jax.Array:
            return _layers.conv(channels, self.dtype, kernel, stride, name=name)(x)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return _layers.norm(train, self.dtype, self.axis_name, name=name)(x)

        def block(x: jax.Array, name: str, channels: int, stride: int) -> jax.Array:
            y = nn.relu(norm(x, f"{name}.bn1")) if self.preact else x
            short = x
            if stride != 1 or x.shape[-1] != channels:
                short = conv(y, channels, f"{name}.shortcut.0", 1, stride)
                short = short if self.preact else norm(short, f"{name}.shortcut.1")
            y = conv(y, channels, f"{name}.conv1", stride=stride)
            y = conv(nn.relu(norm(y, f"{name}.bn2" if self.preact else f"{name}.bn1")), channels, f"{name}.conv2")
            y = y if self.preact else norm(y, f"{name}.bn2")
            inner = max(1, channels // self.reduction)
            y = _mobile.squeeze_excite(y, inner, name, self.dtype, nn.relu, nn.sigmoid) + short
            return y if self.preact else nn.relu(y)

        features: dict[str, jax.Array] = {}
        x = _residual.stem(x, self.width, self.dtype, name="conv1")
        x = features["stem"] = nn.relu(norm(x, "bn1"))
        for stage in range(1, 5):
            for index in range(2):
                stride = 2 if stage > 1 and index == 0 else 1
                x = block(x, f"layer{stage}.{index}", self.width * 2 ** (stage - 1), stride)
            features[f"stage{stage}"] = x
        return _residual.classify(x, self.classes, features, self.pool), features
