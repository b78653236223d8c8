"""Layers of the mobile networks: conv-BN-activation with torchvision's names, and squeeze-and-excitation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bdjax.models import _layers

VARIANTS = {"epsilon": (3, 5), "padding": ("plain", "same")}
"""`epsilon`: n for a batch-normalisation epsilon of 10^-n. `padding`: "same" pads strided convolutions as TensorFlow
does, with one more pixel at the end, for timm's networks with weights from TensorFlow."""
Activation = Callable[[jax.Array], jax.Array]


def plain(x: jax.Array) -> jax.Array:
    """Return x unchanged: no activation."""
    return x


def unit(
    x: jax.Array, features: int, kernel: int, name: str, train: bool, net: Any, *,
    stride: int = 1, groups: int = 1, active: Activation = plain,
) -> jax.Array:  # fmt: skip
    """Apply a convolution NAME.0, batch normalisation NAME.1 and an activation.

    Args:
      x: activations [N, H, W, C].
      features: number of output channels.
      kernel: side of the kernel.
      name: NAME.
      train: whether to use batch statistics.
      net: the network, with dtype, axis_name, epsilon and padding.
      stride: stride along both axes.
      groups: number of channel groups.
      active: the activation.

    Returns:
      Activations [N, H', W', features].
    """
    same = net.padding == "same" and stride > 1
    x = _layers.conv(features, net.dtype, kernel, stride, groups=groups, name=f"{name}.0", same=same)(x)
    return active(_layers.norm(train, net.dtype, net.axis_name, 10.0**-net.epsilon, f"{name}.1")(x))


def squeeze_excite(
    x: jax.Array, features: int, name: str, dtype: Any, active: Activation, gate: Activation
) -> jax.Array:
    """Squeeze-and-excitation (Hu et al., CVPR 2018): weight the channels by a gate computed from their means.

    The dense layers NAME.fc1 and NAME.fc2 are 1x1 convolutions, as torchvision stores them.

    Args:
      x: activations [N, H, W, C].
      features: units of the first dense layer.
      name: NAME.
      dtype: dtype of the computation.
      active: activation after the first layer.
      gate: activation after the second layer, with values in (0, 1).

    Returns:
      Activations [N, H, W, C].
    """
    means = x.mean((1, 2), keepdims=True)
    inner = active(_layers.conv(features, dtype, kernel=1, bias=True, name=f"{name}.fc1")(means))
    return x * gate(_layers.conv(x.shape[-1], dtype, kernel=1, bias=True, name=f"{name}.fc2")(inner))


def swish(x: jax.Array) -> jax.Array:
    """Return x times its logistic function."""
    return nn.silu(x)
