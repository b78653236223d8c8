"""EfficientNet-B3 (Tan & Le, ICML 2019), as in torchvision."""

from bdjax.models import _efficientnet, _mobile

SMALLEST = 8
VARIANTS = _mobile.VARIANTS
_STAGES = (  # fused, kernel, expansion, stride, channels, blocks
    (False, 3, 1, 1, 24, 2),
    (False, 3, 6, 2, 32, 3),
    (False, 5, 6, 2, 48, 3),
    (False, 3, 6, 2, 96, 5),
    (False, 5, 6, 1, 136, 5),
    (False, 5, 6, 2, 232, 6),
    (False, 3, 6, 1, 384, 2),
)


class Net(_efficientnet.EfficientNet):
    """12.2 million parameters with 1,000 classes; 26 blocks."""

    STAGES, STEM, LAST, DROPOUT = _STAGES, 40, 1536, 0.3

    width: int = 40
    epsilon: int = 5
