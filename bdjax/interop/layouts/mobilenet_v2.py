"""MobileNetV2: torchvision's names (chenyaofo's, too), kuangliu's and weiaicunzai's (backdoor-toolbox)."""

import re
from collections.abc import Callable
from typing import Any

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes
from bdjax.models import mobilenet_v2

_COUNTS = (1, 2, 3, 4, 3, 3, 1)  # blocks of each stage


def _parts(ours: str) -> tuple[int, int, str] | None:
    """`features.2.conv.1.0` -> (2, 1, "conv") : the block, its convolution from 0 to 2, and the kind of layer."""
    found = re.fullmatch(r"features\.(\d+)\.conv\.(?:([01])\.([01])|([23]))", ours)
    if found is None:
        return None
    if found[4]:
        return int(found[1]), 2, "conv" if found[4] == "2" else "bn"
    return int(found[1]), int(found[2]), "conv" if found[3] == "0" else "bn"


def _kuangliu(ours: str) -> str:
    """`features.2.conv.1.0` is `layers.1.conv2`."""
    if parts := _parts(ours):
        return f"layers.{parts[0] - 1}.{parts[2]}{parts[1] + 1}"
    ends = {"features.0.0": "conv1", "features.0.1": "bn1", "features.18.0": "conv2", "features.18.1": "bn2"}
    if ours in ends:
        return ends[ours]
    return re.sub(r"features\.(\d+)\.", lambda found: f"layers.{int(found[1]) - 1}.", ours)


def _weiaicunzai(ours: str) -> str:
    """`features.3.conv.1.0` is `stage2.1.residual.3`; a stage of one block has no number for it."""
    if parts := _parts(ours):
        stage, place = 0, parts[0] - 1
        while place >= _COUNTS[stage]:
            stage, place = stage + 1, place - _COUNTS[stage]
        at = f"stage{stage + 1}" if _COUNTS[stage] == 1 else f"stage{stage + 1}.{place}"
        return f"{at}.residual.{3 * parts[1] + (parts[2] == 'bn')}"
    return {
        "features.0.0": "pre.0", "features.0.1": "pre.1", "features.18.0": "conv1.0", "features.18.1": "conv1.1",
    }.get(ours, ours)  # fmt: skip


def _channels(of: Shapes, form: str) -> tuple[int, ...]:
    """Of the stem, the stages and the last convolution; () where they keep the usual ratio."""
    found, place = [of("features.0.0")[0]], 0
    for count in _COUNTS:
        place += count
        third = "conv.1" if place == 1 and form == "torchvision" else "conv.2"
        found += of(f"features.{place}.{third}")[:1]
    found += of("features.18.0")[:1]
    whole = tuple(found)
    return () if len(whole) != 9 or whole == mobilenet_v2.scaled(whole[0]) else whole


def _options(form: str) -> Callable[[Shapes, tuple[int, int]], Options]:
    def options(of: Shapes, size: tuple[int, int]) -> Options:
        channels = _channels(of, form)
        stems = {"torchvision": ("stride2", "plain"), "kuangliu": ("plain",)}.get(form, ("stride2",))
        if form == "torchvision" and min(size) < 64:  # torchvision's would leave one place of such an image
            stems = stems[::-1]
        last = -(-min(size) // 8) if form == "kuangliu" else 1
        return {"form": (form,), "stem": stems, "channels": (channels,), "pool": _pools(of, channels, last)}

    return options


def _pools(of: Shapes, channels: tuple[int, ...], last: int) -> tuple[int, ...]:
    return _residual.pools(of, of("features.18.0")[0], last) if of("features.18.0") else (0,)


def _called(name: str) -> Options | None:
    found = re.fullmatch(r"mobilenet_?v?2(_x?\d_?\d*|_\d+)?", name)
    return {} if found else None


def _naming(label: str, head: str, rename: Callable[[str], str], form: str, **others: Any) -> Naming:
    return Naming(
        "mobilenet_v2", label, {"head": head}, rename=rename, first="features.0.0",
        side=224 if form == "torchvision" else 32, options=_options(form), name_options=_called, **others,
    )  # fmt: skip


NAMINGS = (
    _naming("torchvision", "classifier.1", str, "torchvision"),
    _naming("kuangliu", "linear", _kuangliu, "kuangliu", flattened=("head", "pooled")),
    _naming("weiaicunzai", "conv2", _weiaicunzai, "weiaicunzai", convolved=("head",)),
)
