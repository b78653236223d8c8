"""BadNets' network for MNIST: BackdoorBox's names and those of versions that put each layer into a sequence."""

from math import isqrt

from bdjax.interop.names import Naming, Options, Shapes

_NAMES = ("badnet", "badnets_cnn", "baselinemnistnetwork", "baseline_mnist_network", "mnist_net", "mnistnet")
_SOFTMAX = "where the network ends in a softmax, it is left out: what the model gives are logits"


def _options(of: Shapes, size: tuple[int, int]) -> Options:
    second, dense = of("conv2"), of("fc1")
    units = (second[0] if second else 32, dense[0] if dense else 512)
    return {"units": (units,), "kernel": (of("conv1")[2],), "pool": ("mean", "max")}


def _side(of: Shapes) -> int:
    """Each unpadded convolution takes kernel - 1 pixels, each pooling half of what is left."""
    dense, second, kernel = of("fc1"), of("conv2"), of("conv1")[2]
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
