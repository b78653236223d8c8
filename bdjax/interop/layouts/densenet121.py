"""DenseNet-121: torchvision's and timm's names, and those of torchvision's first weights."""

from typing import Any

from bdjax.interop.names import Naming


def _old(name: str) -> str:
    """Convert to the names of torchvision's first weights: `denselayer1.norm1` was `denselayer1.norm.1`."""
    return f"{name[:-1]}.{name[-1]}" if ".denselayer" in name else name


_SHARED: dict[str, Any] = {"layers": {"features.conv0": "features.conv0", "head": "classifier"}}
NAMINGS = (
    Naming("densenet121", "torchvision", **_SHARED),
    Naming("densenet121", "torchvision's first weights", rename=_old, **_SHARED),
)
