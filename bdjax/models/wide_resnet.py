"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016) of any depth 6n+4 and widening factor k.

The default is WRN-16-1, the network of NAD and ABL. Layers have the names of xternalz's PyTorch implementation, which
these two use. `form` selects the implementation:

    activated   no biases, stride in the first convolution of a block, shortcut from the activation (xternalz)
    late        biases, stride in the second convolution, shortcut from the block's input (meliketoy)
    plain       biases, stride in the first, shortcut from the block's input, no ReLU after the last BN (weiaicunzai)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers, _residual
from bdjax.types import Images, Key

SMALLEST = 4
VARIANTS = {
    "blocks": range(1, 41), "widen": range(1, 65), "form": ("activated", "late", "plain"), "pool": _residual.POOLS,
}  # fmt: skip


class Net(nn.Module):
    """0.18 million parameters; 36.5 million as WRN-28-10. Blocks BN-ReLU-conv-BN-ReLU-conv, plus shortcut."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 16
    """Channels of the first convolution."""
    blocks: int = 2
    """Number of blocks n of each of the three stages."""
    widen: int = 1
    """Widening factor k: the stages have 1, 2 and 4 times k `width` channels."""
    form: str = "activated"
    """Implementation, see above."""
    pool: int = 0
    """See `_residual.POOLS`."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "stage1" .. "stage3", "flat": [N, D]}."""
        biased, late = self.form != "activated", self.form == "late"

        def conv(x: jax.Array, channels: int, name: str, kernel: int = 3, stride: int = 1) -> jax.Array:
            return _layers.conv(channels, self.dtype, kernel, stride, biased, name=name)(x)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return _layers.norm(train, self.dtype, self.axis_name, name=name)(x)

        def block(x: jax.Array, name: str, channels: int, stride: int) -> jax.Array:
            y = nn.relu(norm(x, f"{name}.bn1"))
            short = x
            if stride != 1 or x.shape[-1] != channels:
                short = conv(x if biased else y, channels, f"{name}.convShortcut", 1, stride)
            y = conv(y, channels, f"{name}.conv1", stride=1 if late else stride)
            y = conv(nn.relu(norm(y, f"{name}.bn2")), channels, f"{name}.conv2", stride=stride if late else 1)
            return y + short

        features: dict[str, jax.Array] = {}
        x = features["stem"] = conv(x.astype(self.dtype), self.width, "conv1")
        for stage in range(1, 4):
            for index in range(self.blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                x = block(x, f"block{stage}.layer.{index}", self.width * self.widen * 2 ** (stage - 1), stride)
            features[f"stage{stage}"] = x
        x = norm(x, "bn1")
        return _residual.classify(
            x if self.form == "plain" else nn.relu(x), self.classes, features, self.pool
        ), features
