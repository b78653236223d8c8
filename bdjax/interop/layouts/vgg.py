"""VGG networks: torchvision's and timm's names."""

from typing import Any

from bdjax.interop.names import Naming

_TIMM = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "head": "head.fc"}
_SHARED: dict[str, Any] = {"flattened": ("classifier.0", "pool"), "first": "features.0"}
NAMINGS = tuple(
    naming
    for name in ("vgg16", "vgg19", "vgg16_bn", "vgg19_bn")
    for naming in (
        Naming(name, "torchvision", {"head": "classifier.6"}, **_SHARED),
        Naming(name, "timm", _TIMM, convolved=("classifier.0", "classifier.3"), **_SHARED),
    )
)
