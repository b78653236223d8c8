"""ResNet-18 with the CIFAR stem or torchvision's, under the names of both and of other libraries."""

import re
from collections.abc import Callable
from itertools import count
from typing import Any

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes


def _layers(rename: Callable[[str], str], head: str) -> dict[str, str]:
    """Return the table of names; the shortcut of a block is numbered after its convolutions."""
    conv, norm = count(), count()
    layers = {f"Conv_{next(conv)}": "conv1", f"BatchNorm_{next(norm)}": "bn1"}
    for stage in range(1, 5):
        for block in range(2):
            units = [("conv1", "bn1"), ("conv2", "bn2")]
            if stage > 1 and block == 0:
                units.append(("downsample.0", "downsample.1"))
            for convolution, normalisation in units:
                layers[f"Conv_{next(conv)}"] = f"layer{stage}.{block}.{convolution}"
                layers[f"BatchNorm_{next(norm)}"] = f"layer{stage}.{block}.{normalisation}"
    return {**{name: rename(torch_name) for name, torch_name in layers.items()}, "head": head}


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    stem = shapes("Conv_0")
    stems = _residual.ASSUMED.get(stem[2], ("plain",))
    last = _residual.halved(min(size), 3 + _residual.stem_halvings(stems[0]))
    return {"stem": stems, "pool": _residual.pools(shapes, 8 * stem[0], last), "blur": (False, True)}


def _side(shapes: Shapes) -> int:
    """Return 64 for WaNet's network for 64x64 images, which flattens four positions for its last layer, else 0."""
    head, stem = shapes("head"), shapes("Conv_0")
    return 64 if len(head) == 2 and stem[2] == 3 and head[1] == 4 * 8 * stem[0] else 0


def _name_options(name: str) -> Options | None:
    return {} if re.fullmatch(r"resnet_?18(_comp|_cifar\d*)?", name) else None


_SORTS = (
    *((label, _residual.plain(short), head) for label, short, head in _residual.SORTS),
    ("weiaicunzai", _residual.weiaicunzai, "fc"),
    ("TrojanZoo", _residual.trojanzoo, "classifier.fc"),
)
_SHARED: dict[str, Any] = {
    "flattened": ("head", "pooled"), "options": _options, "image_side": _side, "name_options": _name_options,
}  # fmt: skip
NAMINGS = tuple(
    Naming(model, label, _layers(rename, head), side=side, **_SHARED)
    for label, rename, head in _SORTS
    for model, side in (("resnet18", 32), ("resnet18_imagenet", 224))
)
