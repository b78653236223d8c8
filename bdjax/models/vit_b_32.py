"""ViT-B/32 (Dosovitskiy et al., ICLR 2021): base size, patches of 32 pixels, as in torchvision."""

from bdjax.models import _vit

SMALLEST = 32
VARIANTS = _vit.VARIANTS


class Net(_vit.Vit):
    """88.2 million parameters with 1,000 classes and 224x224 images."""

    PATCH = 32
