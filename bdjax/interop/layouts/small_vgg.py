"""I-BAU's small VGG."""

from math import isqrt
from typing import Any

from bdjax.interop.names import Naming, Shapes


def _layers(dropout: bool, head: str) -> dict[str, str]:
    """Three blocks of twice conv, BatchNorm, ELU, then pooling and, if it is a module of its own, dropout."""
    found, place = {}, 0
    for unit in range(6):
        found[f"Conv_{unit}"], found[f"BatchNorm_{unit}"] = f"features.{place}", f"features.{place + 1}"
        place += 3 + (1 + dropout if unit % 2 else 0)
    return {**found, "head": head}


def _side(of: Shapes) -> int:
    """Three poolings leave an eighth of the side; the dense layer reads what is left of each channel."""
    head = of("head")
    places = head[1] // max(1, 4 * of("Conv_0")[0]) if len(head) == 2 else 0
    return 8 * isqrt(places) if isqrt(places) ** 2 == places else 0


_SHARED: dict[str, Any] = {"flattened": ("head", "block3"), "side": 32, "image_side": _side}
NAMINGS = tuple(
    Naming("small_vgg", f"{label}{more}", _layers(dropout, f"classifier{more}"), **_SHARED)
    for dropout, label in ((True, "I-BAU's release"), (False, "modules without dropout"))
    for more in ("", ".0", ".1")
)
