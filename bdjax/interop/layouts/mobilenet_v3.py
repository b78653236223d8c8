"""MobileNetV3, small and large: torchvision's names and timm's."""

import re
from collections.abc import Callable

from bdjax.interop.layouts import _timm
from bdjax.interop.names import Naming
from bdjax.models import mobilenet_v3_large, mobilenet_v3_small

_STAGES = {"small": (1, 2, 3, 2, 3), "large": (1, 2, 3, 4, 2, 3)}
"""Blocks per stage, in timm's numbering."""
_LAYERS = {"features.0.0": "features.0.0", "head": "classifier.3"}


def _names(size: str) -> Callable[[str], str]:
    """Return the renaming to timm's names: `features.2.block.1.0` is `blocks.1.0.conv_dw`."""
    blocks = {"small": mobilenet_v3_small, "large": mobilenet_v3_large}[size].Net.BLOCKS

    def rename(name: str) -> str:
        match = re.fullmatch(r"features\.(\d+)\.block\.(\d)\.(.+)", name)
        if match is None:
            last = f"features.{len(blocks) + 1}"
            at = f"blocks.{len(_STAGES[size])}.0"
            return {
                "features.0.0": "conv_stem", "features.0.1": "bn1", f"{last}.0": f"{at}.conv", f"{last}.1": f"{at}.bn1",
                "classifier.0": "conv_head",
            }.get(name, name)  # fmt: skip
        index, place = int(match[1]), int(match[2])
        squeezes = blocks[index - 1][2] > 0
        parts = (*(() if index == 1 else ("expand",)), "depth", *(("squeeze",) if squeezes else ()), "project")
        return f"blocks.{_timm.place(_STAGES[size], index - 1)}.{_timm.layer(parts, place, match[3])}"

    return rename


NAMINGS = tuple(
    naming
    for size in ("small", "large")
    for naming in (
        Naming(f"mobilenet_v3_{size}", "torchvision", _LAYERS, options=_timm.torchvision_options(3)),
        Naming(
            f"mobilenet_v3_{size}", "timm", {"head": "classifier"}, rename=_names(size), first="features.0.0",
            convolved=("classifier.0",), options=_timm.options,
            name_options=_timm.name_options(f"(tf_)?mobilenetv3_{size}"),
        ),
    )
)  # fmt: skip
