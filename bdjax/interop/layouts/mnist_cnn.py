"""BadNets' network for MNIST: BackdoorBox's names, and those of implementations that wrap each layer in a sequence."""

from math import isqrt

from bdjax.interop.names import Naming, Options, Shapes

_NAMES = ("badnet", "badnets_cnn", "baselinemnistnetwork", "baseline_mnist_network", "mnist_net", "mnistnet")
_SOFTMAX = "if the network ends in a softmax, it is omitted: the model returns logits"


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    second, dense = shapes("conv2"), shapes("fc1")
    units = (second[0] if second else 32, dense[0] if dense else 512)
    return {"units": (units,), "kernel": (shapes("conv1")[2],), "pool": ("mean", "max")}


def _side(shapes: Shapes) -> int:
    """Return the side of the images: an unpadded convolution removes kernel - 1 pixels, a pooling halves the side."""
    dense, second, kernel = shapes("fc1"), shapes("conv2"), shapes("conv1")[2]
    places = dense[1] // max(1, second[0]) if len(dense) == 2 and second else 0
    return (isqrt(places) * 2 + kernel - 1) * 2 + kernel - 1 if places and isqrt(places) ** 2 == places else 0


NAMINGS = tuple(
    Naming(
        "mnist_cnn", label, layers, first="conv1", side=28, image_side=_side, options=_options, note=_SOFTMAX,
        flattened=("fc1", "conv2"), name_options=lambda name: {} if name in _NAMES else None,
    )
    for label, layers in (
        ("badnets-pytorch", {"conv1": "conv1.0", "conv2": "conv2.0", "fc1": "fc1.0", "head": "fc2.0"}),
        ("BackdoorBox", {"head": "fc2"}),
    )
)  # fmt: skip
