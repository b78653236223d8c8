"""EfficientNet-B3 and EfficientNetV2-S: torchvision's names and timm's."""

import re
from collections.abc import Callable

from bdjax.interop.layouts import _timm
from bdjax.interop.names import Naming
from bdjax.models import efficientnet_b3, efficientnet_v2_s

_LAYERS = {"features.0.0": "features.0.0", "head": "classifier.1"}
_NETS = {"efficientnet_b3": efficientnet_b3.Net, "efficientnet_v2_s": efficientnet_v2_s.Net}
_EPSILONS = {"efficientnet_b3": 5, "efficientnet_v2_s": 3}  # of torchvision's networks


def _names(model: str) -> Callable[[str], str]:
    """Return the renaming to timm's names: `features.4.0.block.1.0` is `blocks.3.0.conv_dw`."""
    stages = _NETS[model].STAGES
    last = f"features.{len(stages) + 1}"
    ends = {"features.0.0": "conv_stem", "features.0.1": "bn1", f"{last}.0": "conv_head", f"{last}.1": "bn2"}

    def rename(name: str) -> str:
        match = re.fullmatch(r"features\.(\d)\.(\d+)\.block\.(\d)\.(.+)", name)
        if match is None:
            return ends.get(name, name)
        fused, _, expansion = stages[int(match[1]) - 1][:3]
        parts: tuple[str, ...] = ("fused", "project") if expansion > 1 else ("single",)
        if not fused:
            parts = (*(("expand",) if expansion > 1 else ()), "depth", "squeeze", "project")
        return f"blocks.{int(match[1]) - 1}.{match[2]}.{_timm.layer(parts, int(match[3]), match[4])}"

    return rename


NAMINGS = tuple(
    naming
    for model, called in (("efficientnet_b3", "efficientnet_b3"), ("efficientnet_v2_s", "efficientnetv2_s"))
    for naming in (
        Naming(model, "torchvision", _LAYERS, options=_timm.torchvision_options(_EPSILONS[model])),
        Naming(
            model, "timm", {"head": "classifier"}, rename=_names(model), first="features.0.0",
            options=_timm.options, name_options=_timm.name_options(f"(tf_)?{called}"),
        ),
    )
)  # fmt: skip
