"""The network of BadNets (Gu et al., 2017) for MNIST: two 5x5 convolutions with pooling, then two dense layers.

Its PyTorch implementations (verazuo's badnets-pytorch, BackdoorBox) use mean-pooling. Some end in a softmax, which is
omitted here because losses and defenses expect logits; softmax(logits) is the output of such a network.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.models._variants import Numbers
from bdjax.types import Images, Key

SMALLEST = 16
VARIANTS = {"units": Numbers(2, 2, 16384), "kernel": (3, 5, 7), "pool": ("mean", "max")}


class Net(nn.Module):
    """281,034 parameters on 28x28x1 with 10 classes. Convolutions are unpadded, with ReLU and 2x2 pooling."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 16
    """Channels of the first convolution."""
    units: tuple[int, ...] = (32, 512)
    """Channels of the second convolution, and units of the first dense layer."""
    kernel: int = 5
    """Side of both convolutions' kernels."""
    pool: str = "mean"
    """Pooling, "mean" or "max"."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"conv1", "conv2", "flat": [N, 512]}."""
        features: dict[str, jax.Array] = {}
        x = x.astype(self.dtype)
        for index, channels in enumerate((self.width, self.units[0]), 1):
            layer = nn.Conv(
                channels, (self.kernel, self.kernel), padding="VALID", dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(), name=f"conv{index}",
            )  # fmt: skip
            x = nn.relu(layer(x))
            x = features[f"conv{index}"] = _layers.mean_pool(x) if self.pool == "mean" else _layers.max_pool(x)
        x = x.reshape(len(x), -1)
        x = features["flat"] = nn.relu(_layers.dense(self.units[1], self.dtype, name="fc1")(x))
        return _layers.head(x, self.classes), features
