"""GoogLeNet (Szegedy et al., CVPR 2015) as in torchvision, with batch normalisation and torchvision's layer names.

torchvision's pretrained weights expect (x - 0.5) / 0.5; with `transform_input` the network converts images that are
normalised by ImageNet's mean and std to that.

Deviations:

- As in torchvision, the third branch of a module has a 3x3 convolution instead of the paper's 5x5.
- The two auxiliary classifiers, used only in training, are omitted.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.models import _layers
from bdjax.types import Images, Key

SMALLEST = 15
VARIANTS = {"transform_input": (False, True)}
_EPSILON = 1e-3
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std by channel
_MODULES = {  # channels of: 1x1; reduction and 3x3 (twice); projection after pooling
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


class Net(nn.Module):
    """6.6 million parameters with 1,000 classes."""

    classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    width: int = 64
    """Channels of the first convolution."""
    transform_input: bool = False
    """Whether to convert ImageNet's normalisation to mean and std 0.5, as torchvision's pretrained network does."""

    @nn.compact
    def __call__(self, x: Images, train: bool = False, keys: Key | None = None):
        """Images [N, H, W, C] -> logits [N, classes], {"stem", "inception3a" .. "inception5b", "flat": [N, 1024]}."""

        def unit(x: jax.Array, channels: int, name: str, kernel: int = 1, stride: int = 1) -> jax.Array:
            channels = max(1, channels * self.width // 64)
            x = _layers.conv(channels, self.dtype, kernel, stride, name=f"{name}.conv")(x)
            return nn.relu(_layers.norm(train, self.dtype, self.axis_name, _EPSILON, f"{name}.bn")(x))

        features: dict[str, jax.Array] = {}
        if self.transform_input:
            x = _transform_input(x)
        x = unit(x.astype(self.dtype), 64, "conv1", kernel=7, stride=2)
        x = unit(_layers.window_max(x, 3, 2, ceil=True), 64, "conv2")
        x = features["stem"] = _layers.window_max(unit(x, 192, "conv3", kernel=3), 3, 2, ceil=True)
        for name, (c1, reduce2, c2, reduce3, c3, c4) in _MODULES.items():
            branches = (
                unit(x, c1, f"{name}.branch1"),
                unit(unit(x, reduce2, f"{name}.branch2.0"), c2, f"{name}.branch2.1", kernel=3),
                unit(unit(x, reduce3, f"{name}.branch3.0"), c3, f"{name}.branch3.1", kernel=3),
                unit(_layers.window_max(x, 3, 1, padding=1), c4, f"{name}.branch4.1"),
            )
            x = features[name] = jnp.concatenate(branches, -1)
            if name in ("inception3b", "inception4e"):
                x = _layers.window_max(x, 3 if name == "inception3b" else 2, 2, ceil=True)
        x = features["flat"] = _layers.dropout(x.mean((1, 2)), 0.2, keys if train else None, 1)
        return _layers.head(x, self.classes), features


def _transform_input(x: Images) -> Images:
    """Convert images normalised by ImageNet's mean and std to mean and std 0.5."""
    if x.shape[-1] != 3:
        raise InputError(f"--transform-input is for images of 3 channels, got {x.shape[-1]}.")
    mean, std = (jnp.asarray(values, x.dtype) for values in _IMAGENET)
    return (x * std + mean - 0.5) / 0.5
