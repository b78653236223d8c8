"""What the mobile networks share: conv-BN-activation with torchvision's names, and squeeze-and-excitation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bdjax.models import _layers

VARIANTS = {"epsilon": (3, 5), "padding": ("plain", "same")}
"""`epsilon`: of batch normalisation, a power of ten: 3 is 1e-3. `padding`: "same" pads strided convolutions as
TensorFlow does, by one pixel more at the end: what timm's networks with weights from there do."""
Activation = Callable[[jax.Array], jax.Array]


def plain(x: jax.Array) -> jax.Array:
    """No activation."""
    return x


def unit(
    x: jax.Array, features: int, kernel: int, name: str, train: bool, net: Any, *,
    stride: int = 1, groups: int = 1, active: Activation = plain,
) -> jax.Array:  # fmt: skip
    """Convolution NAME.0, batch normalisation NAME.1, activation; `net` has dtype, axis_name, epsilon and padding."""
    same = net.padding == "same" and stride > 1
    x = _layers.conv(features, net.dtype, kernel, stride, groups=groups, name=f"{name}.0", same=same)(x)
    return active(_layers.norm(train, net.dtype, net.axis_name, 10.0**-net.epsilon, f"{name}.1")(x))


def squeezed(x: jax.Array, features: int, name: str, dtype: Any, active: Activation, gate: Activation) -> jax.Array:
    """Channels weighted by a gate in (0, 1) that two dense layers NAME.fc1 and .fc2 make of their means.

    Squeeze-and-excitation (Hu et al., CVPR 2018). The layers are 1x1 convolutions, as torchvision stores them.
    """
    means = x.mean((1, 2), keepdims=True)
    inner = active(_layers.conv(features, dtype, kernel=1, bias=True, name=f"{name}.fc1")(means))
    return x * gate(_layers.conv(x.shape[-1], dtype, kernel=1, bias=True, name=f"{name}.fc2")(inner))


def swish(x: jax.Array) -> jax.Array:
    """x times its logistic function."""
    return nn.silu(x)
