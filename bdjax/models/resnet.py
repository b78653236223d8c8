"""Residual networks of 10 to 152 layers and more (He et al., CVPR 2016), with the CIFAR stem or torchvision's.

The default is a ResNet-34 for CIFAR. `blocks` and `bottleneck` select the depth: (3, 4, 6, 3) with bottlenecks is
ResNet-50; `inner` and `groups` give ResNeXt and torchvision's wide networks. `resnet18` and `resnet18_imagenet` are
separate models.
"""

from bdjax.models import _resnets

SMALLEST = 8
VARIANTS = _resnets.VARIANTS


class Net(_resnets.ResNet):
    """21.3 million parameters with 10 classes; 23.5 million as a ResNet-50."""
