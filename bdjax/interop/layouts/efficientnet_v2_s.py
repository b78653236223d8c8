"""EfficientNetV2-S: torchvision's names and timm's."""

import re

from bdjax.interop.layouts import _timm
from bdjax.interop.names import Naming

_EXPANSIONS = (1, 4, 4, 4, 6, 6)
_LAYERS = {"features.0.0": "features.0.0", "head": "classifier.1"}


def _names(ours: str) -> str:
    """`features.4.0.block.1.0` is `blocks.3.0.conv_dw`."""
    found = re.fullmatch(r"features\.(\d)\.(\d+)\.block\.(\d)\.(.+)", ours)
    if found is None:
        return {
            "features.0.0": "conv_stem", "features.0.1": "bn1", "features.7.0": "conv_head", "features.7.1": "bn2",
        }.get(ours, ours)  # fmt: skip
    stage = int(found[1]) - 1
    parts: tuple[str, ...] = ("single",) if _EXPANSIONS[stage] == 1 else ("fused", "project")
    parts = parts if stage < 3 else ("expand", "depth", "squeeze", "project")
    return f"blocks.{stage}.{found[2]}.{_timm.layer(parts, int(found[3]), found[4])}"


NAMINGS = (
    Naming("efficientnet_v2_s", "torchvision", _LAYERS, options=_timm.norm_options(3)),
    Naming(
        "efficientnet_v2_s", "timm", {"head": "classifier"}, rename=_names, first="features.0.0",
        options=_timm.norm_options(5), called=_timm.called("(tf_)?efficientnetv2_s"),
    ),
)  # fmt: skip
