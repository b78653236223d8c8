"""Residual networks for CIFAR (He et al., CVPR 2016): three stages of 16, 32 and 64 channels, 6n+2 layers.

`blocks` is (n, n, n): 20 layers have n = 3, the default; 32, 44, 56 and 110 have n = 5, 7, 9 and 18. Shortcuts of
option A, as in the paper, have no weights; those of option B are 1x1 convolutions.
"""

from bdjax.models import _resnets

SMALLEST = 4
VARIANTS = _resnets.VARIANTS


class Net(_resnets.ResNet):
    """0.27 million parameters; 0.85 million with 56 layers, 1.73 million with 110."""

    width: int = 16
    blocks: tuple[int, ...] = (3, 3, 3)
    shortcut: str = "a"
