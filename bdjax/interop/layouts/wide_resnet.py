"""Wide residual networks: xternalz's names (NAD, ABL, TRADES), meliketoy's (backdoor-toolbox) and weiaicunzai's."""

import re
from collections.abc import Callable
from typing import Any

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes

_CALLED = re.compile(r"(?:wrn|wide_?resnet)_?(?:(\d+)_?x?(\d+)?)?")
_PLACES = {"bn1": "residual.0", "conv1": "residual.2", "bn2": "residual.3", "conv2": "residual.6"}


def _meliketoy(ours: str) -> str:
    """`block1.layer.0.convShortcut` is `layer1.0.shortcut.0`."""
    return re.sub(r"block(\d)\.layer", r"layer\1", ours).replace("convShortcut", "shortcut.0")


def _weiaicunzai(ours: str) -> str:
    """`block1.layer.0.conv2` is `conv2.0.residual.6`, with dropout before it."""
    found = re.fullmatch(r"block(\d)\.layer\.(\d+)\.(\w+)", ours)
    if found is None:
        return {"conv1": "init_conv", "bn1": "bn"}.get(ours, ours)
    return f"conv{int(found[1]) + 1}.{found[2]}.{_PLACES.get(found[3], 'shortcut.0')}"


def _options(form: str) -> Callable[[Shapes, tuple[int, int]], Options]:
    def options(of: Shapes, size: tuple[int, int]) -> Options:
        width, blocks = of("conv1")[0], 0
        while blocks < 64 and of(f"block1.layer.{blocks}.conv1"):
            blocks += 1
        inside = of("block1.layer.0.conv1")
        widen = inside[0] // width if inside and width else 1
        last = _residual.halved(min(size), 2)
        pools = _residual.pools(of, 4 * width * max(1, widen), last)
        return {"blocks": (max(1, blocks),), "widen": (max(1, widen),), "form": (form,), "pool": pools}

    return options


def _called(name: str) -> Options | None:
    """wrn_16_1, wideresnet28_10, wrn28x10, wideresnet: of 6n + 4 layers."""
    found = _CALLED.fullmatch(name)
    if found is None or (found[1] and (int(found[1]) - 4) % 6):
        return None
    said = {} if not found[1] else {"blocks": ((int(found[1]) - 4) // 6,)}
    return said if not found[2] else {**said, "widen": (int(found[2]),)}


def _naming(label: str, head: str, rename: Callable[[str], str], form: str, **others: Any) -> Naming:
    return Naming(
        "wide_resnet", label, {"head": head}, rename=rename, first="conv1", side=32, options=_options(form),
        name_options=_called, flattened=("head", "pooled"), **others,
    )  # fmt: skip


NAMINGS = (
    _naming("xternalz", "fc", str, "activated", ignored=("sub_block1.",)),  # TRADES' has it and never runs it
    _naming("meliketoy", "linear", _meliketoy, "late"),
    _naming("weiaicunzai", "linear", _weiaicunzai, "plain"),
)
