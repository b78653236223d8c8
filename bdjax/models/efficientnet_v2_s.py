"""EfficientNetV2-S (Tan & Le, ICML 2021), as in torchvision."""

from bdjax.models import _efficientnet, _mobile

SMALLEST = 8
VARIANTS = _mobile.VARIANTS
_STAGES = (  # fused, kernel, expansion, stride, channels, blocks
    (True, 3, 1, 1, 24, 2),
    (True, 3, 4, 2, 48, 4),
    (True, 3, 4, 2, 64, 4),
    (False, 3, 4, 2, 128, 6),
    (False, 3, 6, 1, 160, 9),
    (False, 3, 6, 2, 256, 15),
)


class Net(_efficientnet.EfficientNet):
    """21.5 million parameters with 1,000 classes; 40 blocks, the first ten of them fused."""

    STAGES, STEM, LAST, DROPOUT = _STAGES, 24, 1280, 0.2

    width: int = 24
