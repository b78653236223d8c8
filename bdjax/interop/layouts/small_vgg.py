"""I-BAU's small VGG: names of its release, and of implementations without dropout modules."""

from math import isqrt
from typing import Any

from bdjax.interop.names import Naming, Shapes


def _layers(dropout: bool, head: str) -> dict[str, str]:
    """Return the table of names: three blocks of two conv-BatchNorm-ELU, pooling and, if a module, dropout."""
    layers, index = {}, 0
    for unit in range(6):
        layers[f"Conv_{unit}"], layers[f"BatchNorm_{unit}"] = f"features.{index}", f"features.{index + 1}"
        index += 3 + (1 + dropout if unit % 2 else 0)
    return {**layers, "head": head}


def _side(shapes: Shapes) -> int:
    """Return the side of the images, which three poolings reduce to an eighth before the dense layer."""
    head = shapes("head")
    places = head[1] // max(1, 4 * shapes("Conv_0")[0]) if len(head) == 2 else 0
    return 8 * isqrt(places) if isqrt(places) ** 2 == places else 0


_SHARED: dict[str, Any] = {"flattened": ("head", "block3"), "side": 32, "image_side": _side}
NAMINGS = tuple(
    Naming("small_vgg", f"{label}{more}", _layers(dropout, f"classifier{more}"), **_SHARED)
    for dropout, label in ((True, "I-BAU's release"), (False, "modules without dropout"))
    for more in ("", ".0", ".1")
)
