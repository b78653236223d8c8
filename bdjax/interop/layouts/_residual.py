"""Layer names and derived options that the tables of the residual networks share."""

import re
from collections.abc import Callable
from math import isqrt

from bdjax.interop.names import Shapes

ASSUMED = {3: ("plain", "max", "stride2", "stride2-max"), 7: ("stride2-max", "stride2", "plain", "max")}
"""Possible stems by the kernel size of the first convolution; a file does not determine them, the first is assumed."""
_WINDOWS = (4, 8)  # pooling windows of the last feature in known implementations

SORTS: tuple[tuple[str, str, str], ...] = (
    ("the CIFAR networks'", "shortcut", "linear"),
    ("torchvision", "downsample", "fc"),
    ("shortcut and fc", "shortcut", "fc"),
    ("downsample and linear", "downsample", "linear"),
)
"""Label, name of the shortcut, name of the last layer, for networks whose block layers are conv1, bn1, conv2, ..."""


def plain(shortcut: str) -> Callable[[str], str]:
    """Return the renaming from torchvision's names that only differs in the name of the shortcut."""
    return lambda name: name.replace(".downsample.", f".{shortcut}.")


def weiaicunzai(name: str) -> str:
    """Convert torchvision's names to weiaicunzai's: `layer1.0.conv2` is `conv2_x.0.residual_function.3`."""
    if name in ("conv1", "bn1"):
        return "conv1.0" if name == "conv1" else "conv1.1"
    stage, block, layer = re.match(r"layer(\d)\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    if layer.startswith("downsample"):
        return f"conv{int(stage) + 1}_x.{block}.{layer.replace('downsample', 'shortcut')}"
    index = 3 * (int(layer[-1]) - 1) + layer.startswith("bn")
    return f"conv{int(stage) + 1}_x.{block}.residual_function.{index}"


def trojanzoo(name: str) -> str:
    """Convert torchvision's names to TrojanZoo's, which has them under `features`."""
    return f"features.{name}"


def pools(shapes: Shapes, channels: int, side: int) -> tuple[int, ...]:
    """Return the possible pooling windows between the last feature and the last layer; 0 is global mean pooling.

    Args:
      shapes: shapes of the file's tensors.
      channels: channels of the last feature.
      side: shorter side of the last feature.

    Returns:
      The possible windows, the default first.
    """
    head = shapes("head")
    places = head[1] // channels if len(head) == 2 and channels else 1
    if places > 1:
        across = isqrt(places)
        return (side // across if across**2 == places and side >= across else 0,)
    return (0, *(window for window in _WINDOWS if window < side < 2 * window))


def halved(side: int, times: int) -> int:
    """Return the side in pixels after `times` layers of stride 2."""
    for _ in range(times):
        side = -(-side // 2)
    return side


def stem_halvings(stem: str) -> int:
    """Return how often a stem halves the side."""
    return stem.startswith("stride2") + stem.endswith("max")
