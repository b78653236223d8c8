"""MobileNetV2: the names of torchvision (and chenyaofo), kuangliu, and weiaicunzai (backdoor-toolbox)."""

import re
from collections.abc import Callable
from typing import Any

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes
from bdjax.models import mobilenet_v2

_COUNTS = (1, 2, 3, 4, 3, 3, 1)  # blocks of each stage


def _parts(name: str) -> tuple[int, int, str] | None:
    """Split `features.2.conv.1.0` into (2, 1, "conv"): block, convolution (0 to 2) and kind of layer."""
    match = re.fullmatch(r"features\.(\d+)\.conv\.(?:([01])\.([01])|([23]))", name)
    if match is None:
        return None
    if match[4]:
        return int(match[1]), 2, "conv" if match[4] == "2" else "bn"
    return int(match[1]), int(match[2]), "conv" if match[3] == "0" else "bn"


def _kuangliu(name: str) -> str:
    """Convert to kuangliu's names: `features.2.conv.1.0` is `layers.1.conv2`."""
    if parts := _parts(name):
        return f"layers.{parts[0] - 1}.{parts[2]}{parts[1] + 1}"
    ends = {"features.0.0": "conv1", "features.0.1": "bn1", "features.18.0": "conv2", "features.18.1": "bn2"}
    if name in ends:
        return ends[name]
    return re.sub(r"features\.(\d+)\.", lambda match: f"layers.{int(match[1]) - 1}.", name)


def _weiaicunzai(name: str) -> str:
    """Convert to weiaicunzai's names: `features.3.conv.1.0` is `stage2.1.residual.3`; a single block has no number."""
    if parts := _parts(name):
        stage, index = 0, parts[0] - 1
        while index >= _COUNTS[stage]:
            stage, index = stage + 1, index - _COUNTS[stage]
        prefix = f"stage{stage + 1}" if _COUNTS[stage] == 1 else f"stage{stage + 1}.{index}"
        return f"{prefix}.residual.{3 * parts[1] + (parts[2] == 'bn')}"
    return {
        "features.0.0": "pre.0", "features.0.1": "pre.1", "features.18.0": "conv1.0", "features.18.1": "conv1.1",
    }.get(name, name)  # fmt: skip


def _channels(shapes: Shapes, form: str) -> tuple[int, ...]:
    """Return the channels of the stem, the stages and the last convolution; () where they have the usual ratio."""
    channels, block = [shapes("features.0.0")[0]], 0
    for count in _COUNTS:
        block += count
        last = "conv.1" if block == 1 and form == "torchvision" else "conv.2"
        channels += shapes(f"features.{block}.{last}")[:1]
    channels += shapes("features.18.0")[:1]
    is_usual = len(channels) != 9 or tuple(channels) == mobilenet_v2.scaled(channels[0])
    return () if is_usual else tuple(channels)


def _options(form: str) -> Callable[[Shapes, tuple[int, int]], Options]:
    def options(shapes: Shapes, size: tuple[int, int]) -> Options:
        channels = _channels(shapes, form)
        stems = {"torchvision": ("stride2", "plain"), "kuangliu": ("plain",)}.get(form, ("stride2",))
        if form == "torchvision" and min(size) < 64:  # torchvision's stem would reduce such an image to one pixel
            stems = stems[::-1]
        last = -(-min(size) // 8) if form == "kuangliu" else 1
        return {"form": (form,), "stem": stems, "channels": (channels,), "pool": _pools(shapes, channels, last)}

    return options


def _pools(shapes: Shapes, channels: tuple[int, ...], last: int) -> tuple[int, ...]:
    return _residual.pools(shapes, shapes("features.18.0")[0], last) if shapes("features.18.0") else (0,)


def _name_options(name: str) -> Options | None:
    match = re.fullmatch(r"mobilenet_?v?2(_x?\d_?\d*|_\d+)?", name)
    return {} if match else None


def _naming(label: str, head: str, rename: Callable[[str], str], form: str, **others: Any) -> Naming:
    return Naming(
        "mobilenet_v2", label, {"head": head}, rename=rename, first="features.0.0",
        side=224 if form == "torchvision" else 32, options=_options(form), name_options=_name_options, **others,
    )  # fmt: skip


NAMINGS = (
    _naming("torchvision", "classifier.1", str, "torchvision"),
    _naming("kuangliu", "linear", _kuangliu, "kuangliu", flattened=("head", "pooled")),
    _naming("weiaicunzai", "conv2", _weiaicunzai, "weiaicunzai", convolved=("head",)),
)
