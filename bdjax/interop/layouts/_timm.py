"""timm's names for the blocks of the mobile networks, and the options that its files do not determine."""

import re
from collections.abc import Callable

from bdjax.interop.names import Options, Shapes


def place(stages: tuple[int, ...], index: int) -> str:
    """Return "STAGE.POSITION" of the block `index`, all counted from 0, for stages of these numbers of blocks."""
    before = [sum(stages[:stage]) for stage in range(len(stages))]
    stage = max(stage for stage, first in enumerate(before) if first <= index)
    return f"{stage}.{index - before[stage]}"


def layer(parts: tuple[str, ...], index: int, leaf: str) -> str:
    """Return timm's name of a layer in a block.

    Args:
      parts: parts of the block in torchvision's order: "expand", "depth", "squeeze", "project"; "fused" is expand and
        depth in one convolution, "single" all of them.
      index: index of the part.
      leaf: "0" (convolution), "1" (normalisation), "fc1" or "fc2".

    Returns:
      The name within the block.
    """
    part = parts[index]
    if part == "squeeze":
        return {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}[leaf]
    if leaf == "1":
        return f"bn{sum(kind != 'squeeze' for kind in parts[: index + 1])}"
    last = "conv_pw" if "expand" not in parts and "fused" not in parts else "conv_pwl"
    return {"expand": "conv_pw", "depth": "conv_dw", "fused": "conv_exp", "single": "conv", "project": last}[part]


def torchvision_options(epsilon: int) -> Callable[[Shapes, tuple[int, int]], Options]:
    """Return the options (see :data:`bdjax.models._mobile.VARIANTS`) of torchvision's network."""
    return lambda shapes, size: {"epsilon": (epsilon,), "padding": ("plain",)}


def options(shapes: Shapes, size: tuple[int, int]) -> Options:
    """Return the options of timm's network, some of whose weights come from TensorFlow."""
    return {"epsilon": (5, 3), "padding": ("plain", "same")}


def name_options(pattern: str) -> Callable[[str], Options | None]:
    """Return the `name_options` of timm's names, such as mobilenetv3_small_100."""
    return lambda name: {} if re.fullmatch(rf"{pattern}(_\d+|_base)?", name) else None
