"""DenseNet-121: torchvision's names, which timm's are, too, and those of its first weights."""

from typing import Any

from bdjax.interop.names import Naming


def _old(ours: str) -> str:
    """`denselayer1.norm1` was `denselayer1.norm.1` in torchvision's first weights."""
    return f"{ours[:-1]}.{ours[-1]}" if ".denselayer" in ours else ours


_SHARED: dict[str, Any] = {"layers": {"features.conv0": "features.conv0", "head": "classifier"}}
NAMINGS = (
    Naming("densenet121", "torchvision", **_SHARED),
    Naming("densenet121", "torchvision's first weights", rename=_old, **_SHARED),
)
