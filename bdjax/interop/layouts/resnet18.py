"""ResNet-18 with the CIFAR stem and with torchvision's, under the names of both and of other libraries."""

import re
from collections.abc import Callable
from itertools import count
from typing import Any

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes


def _layers(rename: Callable[[str], str], head: str) -> dict[str, str]:
    """Ours are numbered as the network is built: the shortcut follows the convolutions of a block."""
    conv, norm = count(), count()
    found = {f"Conv_{next(conv)}": "conv1", f"BatchNorm_{next(norm)}": "bn1"}
    for stage in range(1, 5):
        for block in range(2):
            units = [("conv1", "bn1"), ("conv2", "bn2")]
            if stage > 1 and block == 0:
                units.append(("downsample.0", "downsample.1"))
            for convolution, normalisation in units:
                found[f"Conv_{next(conv)}"] = f"layer{stage}.{block}.{convolution}"
                found[f"BatchNorm_{next(norm)}"] = f"layer{stage}.{block}.{normalisation}"
    return {**{ours: rename(theirs) for ours, theirs in found.items()}, "head": head}


def _options(of: Shapes, size: tuple[int, int]) -> Options:
    stem = of("Conv_0")
    stems = _residual.ASSUMED.get(stem[2], ("plain",))
    last = _residual.halved(min(size), 3 + _residual.stem_halvings(stems[0]))
    return {"stem": stems, "pool": _residual.pools(of, 8 * stem[0], last), "blur": (False, True)}


def _side(of: Shapes) -> int:
    """WaNet's network for 64x64 flattens four places into its last layer."""
    head, stem = of("head"), of("Conv_0")
    return 64 if len(head) == 2 and stem[2] == 3 and head[1] == 4 * 8 * stem[0] else 0


def _called(name: str) -> Options | None:
    return {} if re.fullmatch(r"resnet_?18(_comp|_cifar\d*)?", name) else None


_SORTS = (
    *((label, _residual.plain(short), head) for label, short, head in _residual.SORTS),
    ("weiaicunzai", _residual.weiaicunzai, "fc"),
    ("TrojanZoo", _residual.trojanzoo, "classifier.fc"),
)
_SHARED: dict[str, Any] = {
    "flattened": ("head", "pooled"), "options": _options, "image_side": _side, "name_options": _called,
}  # fmt: skip
NAMINGS = tuple(
    Naming(model, label, _layers(rename, head), side=side, **_SHARED)
    for label, rename, head in _SORTS
    for model, side in (("resnet18", 32), ("resnet18_imagenet", 224))
)
