"""MobileNetV3-Large (Howard et al., ICCV 2019), as in torchvision."""

from bdjax.models import _mobile, _mobilenet_v3

SMALLEST = 8
VARIANTS = _mobile.VARIANTS
_BLOCKS = (  # kernel, expanded channels, squeeze channels (0: none), channels, hard swish, stride
    (3, 16, 0, 16, False, 1),
    (3, 64, 0, 24, False, 2),
    (3, 72, 0, 24, False, 1),
    (5, 72, 24, 40, False, 2),
    (5, 120, 32, 40, False, 1),
    (5, 120, 32, 40, False, 1),
    (3, 240, 0, 80, True, 2),
    (3, 200, 0, 80, True, 1),
    (3, 184, 0, 80, True, 1),
    (3, 184, 0, 80, True, 1),
    (3, 480, 120, 112, True, 1),
    (3, 672, 168, 112, True, 1),
    (5, 672, 168, 160, True, 2),
    (5, 960, 240, 160, True, 1),
    (5, 960, 240, 160, True, 1),
)


class Net(_mobilenet_v3.MobileNetV3):
    """5.5 million parameters with 1,000 classes; fifteen inverted residual blocks."""

    BLOCKS, LAST = _BLOCKS, (960, 1280)
