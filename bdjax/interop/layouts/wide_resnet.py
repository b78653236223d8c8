"""Wide residual networks: names of xternalz (NAD, ABL, TRADES), meliketoy (backdoor-toolbox) and weiaicunzai."""

import re
from collections.abc import Callable
from typing import Any

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes

_NAME = re.compile(r"(?:wrn|wide_?resnet)_?(?:(\d+)_?x?(\d+)?)?")
_PLACES = {"bn1": "residual.0", "conv1": "residual.2", "bn2": "residual.3", "conv2": "residual.6"}


def _meliketoy(name: str) -> str:
    """Convert to meliketoy's names: `block1.layer.0.convShortcut` is `layer1.0.shortcut.0`."""
    return re.sub(r"block(\d)\.layer", r"layer\1", name).replace("convShortcut", "shortcut.0")


def _weiaicunzai(name: str) -> str:
    """Convert to weiaicunzai's names: `block1.layer.0.conv2` is `conv2.0.residual.6`, with dropout before it."""
    match = re.fullmatch(r"block(\d)\.layer\.(\d+)\.(\w+)", name)
    if match is None:
        return {"conv1": "init_conv", "bn1": "bn"}.get(name, name)
    return f"conv{int(match[1]) + 1}.{match[2]}.{_PLACES.get(match[3], 'shortcut.0')}"


def _options(form: str) -> Callable[[Shapes, tuple[int, int]], Options]:
    def options(shapes: Shapes, size: tuple[int, int]) -> Options:
        width, blocks = shapes("conv1")[0], 0
        while blocks < 64 and shapes(f"block1.layer.{blocks}.conv1"):
            blocks += 1
        inside = shapes("block1.layer.0.conv1")
        widen = inside[0] // width if inside and width else 1
        last = _residual.halved(min(size), 2)
        pools = _residual.pools(shapes, 4 * width * max(1, widen), last)
        return {"blocks": (max(1, blocks),), "widen": (max(1, widen),), "form": (form,), "pool": pools}

    return options


def _name_options(name: str) -> Options | None:
    """Return the options that names of 6n + 4 layers imply: wrn_16_1, wideresnet28_10, wrn28x10, wideresnet."""
    match = _NAME.fullmatch(name)
    if match is None or (match[1] and (int(match[1]) - 4) % 6):
        return None
    options = {} if not match[1] else {"blocks": ((int(match[1]) - 4) // 6,)}
    return options if not match[2] else {**options, "widen": (int(match[2]),)}


def _naming(label: str, head: str, rename: Callable[[str], str], form: str, **others: Any) -> Naming:
    return Naming(
        "wide_resnet", label, {"head": head}, rename=rename, first="conv1", side=32, options=_options(form),
        name_options=_name_options, flattened=("head", "pooled"), **others,
    )  # fmt: skip


NAMINGS = (
    _naming("xternalz", "fc", str, "activated", ignored=("sub_block1.",)),  # defined but unused in TRADES
    _naming("meliketoy", "linear", _meliketoy, "late"),
    _naming("weiaicunzai", "linear", _weiaicunzai, "plain"),
)
