"""Residual networks of any depth: `resnet` with four stages, `resnet_cifar` with three."""

import re
from collections.abc import Callable
from typing import Any

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes

_DEPTHS = {
    10: (1, 1, 1, 1), 14: (2, 2, 1, 1), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}  # fmt: skip
_NAME = re.compile(
    r"(?:wide_|wide)?(?:resnet|resnext)_?(\d+)(?:_32x4d|_32x8d|_64x4d|_2)?(?:_imagenet|_comp|_cifar\d*)?"
)


def _dxy(name: str) -> str:
    """Convert to D-X-Y's names: `layer1.0.conv1` is `stage_1.0.conv_a`."""
    if name in ("conv1", "bn1"):
        return f"{name[:-1]}_1_3x3" if name == "conv1" else "bn_1"
    name = re.sub(r"layer(\d)", r"stage_\1", name)
    return re.sub(r"(conv|bn)([12])$", lambda match: f"{match[1]}_{'ab'[int(match[2]) - 1]}", name)


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    stem, blocks = shapes("conv1"), []
    for stage in range(1, 5):
        count = 0
        while count < 64 and shapes(f"layer{stage}.{count}.conv1"):
            count += 1
        blocks += [count] if count else []
    bottleneck, second = bool(shapes("layer1.0.conv3")), shapes("layer1.0.conv2")
    width, kernel = stem[0], stem[2]
    inner, groups = (second[0], second[0] // max(1, second[1])) if bottleneck and len(second) == 4 else (0, 1)
    projects = any(shapes(f"layer{stage}.0.downsample.0") for stage in range(1, 5))
    stems = _residual.ASSUMED.get(kernel, ("plain",)) if len(blocks) == 4 else ("plain",)
    last = _residual.halved(min(size), max(0, len(blocks) - 1) + _residual.stem_halvings(stems[0]))
    return {
        "blocks": (tuple(blocks) or (1,),),
        "bottleneck": (bottleneck,),
        "inner": (0 if inner == width else inner,),
        "groups": (max(1, groups),),
        "shortcut": ("b",) if projects else ("a-end",) if shapes.naming.label == "D-X-Y" else ("a", "a-end"),
        "kernel": (kernel,),
        "stem": stems,
        "blur": (False, True) if len(blocks) == 4 else (False,),
        "pool": _residual.pools(shapes, width * 2 ** max(0, len(blocks) - 1) * (4 if bottleneck else 1), last),
    }


def _four(name: str) -> Options | None:
    """Return the options that a name with four stages implies: resnet34, resnext50_32x4d, wide_resnet50_2, ..."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) not in _DEPTHS:
        return None
    depth = int(match[1])
    return {"blocks": (_DEPTHS[depth],), "bottleneck": (depth >= 50,)}


def _three(name: str) -> Options | None:
    """Return the options that a name with three stages implies: 6n+2 layers in basic or 9n+2 in bottleneck blocks."""
    match = _NAME.fullmatch(name)
    if match is None or name.startswith("wide") or int(match[1]) in (10, 18, 34, 50, 101, 152):
        return None
    depth = int(match[1])
    for layers in (6, 9):
        if depth > 2 and (depth - 2) % layers == 0:
            return {"blocks": (((depth - 2) // layers,) * 3,), "bottleneck": (layers == 9,)}
    return None


def _all(model: str, side: int, name_options: Callable[[str], Options | None]) -> list[Naming]:
    shared: dict[str, Any] = {
        "first": "conv1", "side": side, "options": _options, "name_options": name_options,
        "flattened": ("head", "pooled"),
    }  # fmt: skip
    sorts = [(label, _residual.plain(short), head) for label, short, head in _residual.SORTS]
    sorts += [("weiaicunzai", _residual.weiaicunzai, "fc"), ("TrojanZoo", _residual.trojanzoo, "classifier.fc")]
    if model == "resnet_cifar":
        sorts.append(("D-X-Y", _dxy, "classifier"))
    return [Naming(model, label, {"head": head}, rename=rename, **shared) for label, rename, head in sorts]


NAMINGS = (*_all("resnet", 32, _four), *_all("resnet_cifar", 32, _three))
