"""What the tables of the residual networks share: how their layers are called, and what their shapes tell."""

import re
from collections.abc import Callable
from math import isqrt

from bdjax.interop.names import Shapes

ASSUMED = {3: ("plain", "max", "stride2", "stride2-max"), 7: ("stride2-max", "stride2", "plain", "max")}
"""Stems by the side of the first convolution's kernel; a file does not tell them apart, and the first is assumed."""
_WINDOWS = (4, 8)  # that versions in use average the last feature over

SORTS: tuple[tuple[str, str, str], ...] = (
    ("the CIFAR networks'", "shortcut", "linear"),
    ("torchvision", "downsample", "fc"),
    ("shortcut and fc", "shortcut", "fc"),
    ("downsample and linear", "downsample", "linear"),
)
"""Label, name of the shortcut and of the last layer, where a block's layers are conv1, bn1, conv2 .."""


def plain(shortcut: str) -> Callable[[str], str]:
    """torchvision's names with another one for the shortcut."""
    return lambda ours: ours.replace(".downsample.", f".{shortcut}.")


def weiaicunzai(ours: str) -> str:
    """torchvision's `layer1.0.conv2` is `conv2_x.0.residual_function.3`; the stem is a sequence of its own."""
    if ours in ("conv1", "bn1"):
        return "conv1.0" if ours == "conv1" else "conv1.1"
    stage, block, layer = re.match(r"layer(\d)\.(\d+)\.(.+)", ours).groups()  # type: ignore[union-attr]
    if layer.startswith("downsample"):
        return f"conv{int(stage) + 1}_x.{block}.{layer.replace('downsample', 'shortcut')}"
    place = 3 * (int(layer[-1]) - 1) + layer.startswith("bn")
    return f"conv{int(stage) + 1}_x.{block}.residual_function.{place}"


def trojanzoo(ours: str) -> str:
    """TrojanZoo keeps torchvision's names in `features`."""
    return f"features.{ours}"


def pools(of: Shapes, channels: int, side: int) -> tuple[int, ...]:
    """How a last feature of `channels` and `side` becomes the vector that the last layer takes: 0 is one mean.

    Args: side: in places, of the shorter side.
    """
    head = of("head")
    places = head[1] // channels if len(head) == 2 and channels else 1
    if places > 1:
        across = isqrt(places)
        return (side // across if across**2 == places and side >= across else 0,)
    return (0, *(window for window in _WINDOWS if window < side < 2 * window))


def halved(side: int, times: int) -> int:
    """A side in pixels after so many layers of stride 2."""
    for _ in range(times):
        side = -(-side // 2)
    return side


def stem_halvings(stem: str) -> int:
    """How often a stem halves the side."""
    return stem.startswith("stride2") + stem.endswith("max")
