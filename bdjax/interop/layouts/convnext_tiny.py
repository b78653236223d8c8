"""ConvNeXt-Tiny: torchvision's names."""

from bdjax.interop.names import Naming

NAMINGS = (Naming("convnext_tiny", "torchvision", {"features.0.0": "features.0.0", "head": "classifier.2"}),)
