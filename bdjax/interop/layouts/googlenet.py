"""GoogLeNet: torchvision's names."""

from bdjax.interop.names import Naming, Options, Shapes


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    return {"transform_input": (False, True) if shapes("conv1.conv")[1] == 3 else (False,)}


NAMINGS = (
    Naming(
        "googlenet", "torchvision", {"conv1.conv": "conv1.conv", "head": "fc"}, ignored=("aux1.", "aux2."),
        options=_options,
    ),
)  # fmt: skip
