"""MobileNetV3-Small (Howard et al., ICCV 2019), as in torchvision."""

from bdjax.models import _mobile, _mobilenet_v3

SMALLEST = 8
VARIANTS = _mobile.VARIANTS
_BLOCKS = (  # kernel, expanded channels, squeeze channels (0: none), channels, hard swish, stride
    (3, 16, 8, 16, False, 2),
    (3, 72, 0, 24, False, 2),
    (3, 88, 0, 24, False, 1),
    (5, 96, 24, 40, True, 2),
    (5, 240, 64, 40, True, 1),
    (5, 240, 64, 40, True, 1),
    (5, 120, 32, 48, True, 1),
    (5, 144, 40, 48, True, 1),
    (5, 288, 72, 96, True, 2),
    (5, 576, 144, 96, True, 1),
    (5, 576, 144, 96, True, 1),
)


class Net(_mobilenet_v3.MobileNetV3):
    """2.5 million parameters with 1,000 classes; eleven inverted residual blocks."""

    BLOCKS, LAST = _BLOCKS, (576, 1024)
