"""ViT-B/16 (Dosovitskiy et al., ICLR 2021): base size, patches of 16 pixels, as in torchvision."""

from bdjax.models import _vit

SMALLEST = 16
VARIANTS = _vit.VARIANTS


class Net(_vit.Vit):
    """86.6 million parameters with 1,000 classes and 224x224 images."""

    PATCH = 16
