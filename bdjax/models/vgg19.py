"""VGG-19 (Simonyan & Zisserman, ICLR 2015), as in torchvision."""

from bdjax.models import _vgg

SMALLEST = _vgg.SMALLEST


class Net(_vgg.Vgg):
    """143.7 million parameters with 1,000 classes."""

    LAYERS, NORMED = 19, False
