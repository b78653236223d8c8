"""How timm names the blocks of the mobile networks, and what its files do not tell of them."""

import re
from collections.abc import Callable

from bdjax.interop.names import Options, Shapes


def place(stages: tuple[int, ...], index: int) -> str:
    """The stage and the place in it of block `index`, both from 0: "1.0"."""
    before = [sum(stages[:stage]) for stage in range(len(stages))]
    stage = max(stage for stage, first in enumerate(before) if first <= index)
    return f"{stage}.{index - before[stage]}"


def layer(parts: tuple[str, ...], index: int, leaf: str) -> str:
    """timm's name of a layer in a block.

    Args: parts: of the block in torchvision's order, of expand, depth, squeeze, project, and fused and single for
      convolutions that are both; index: of the part; leaf: "0" (convolution), "1" (normalisation), "fc1" or "fc2".
    """
    part = parts[index]
    if part == "squeeze":
        return {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}[leaf]
    if leaf == "1":
        return f"bn{sum(one != 'squeeze' for one in parts[: index + 1])}"
    last = "conv_pw" if "expand" not in parts and "fused" not in parts else "conv_pwl"
    return {"expand": "conv_pw", "depth": "conv_dw", "fused": "conv_exp", "single": "conv", "project": last}[part]


def torchvision_options(epsilon: int) -> Callable[[Shapes, tuple[int, int]], Options]:
    """Options of :data:`bdjax.models._mobile.VARIANTS` as torchvision's network has them."""
    return lambda of, size: {"epsilon": (epsilon,), "padding": ("plain",)}


def options(of: Shapes, size: tuple[int, int]) -> Options:
    """The same of timm's, which has weights from TensorFlow, too."""
    return {"epsilon": (5, 3), "padding": ("plain", "same")}


def called(name: str) -> Callable[[str], Options | None]:
    """timm's names: mobilenetv3_small_100."""
    return lambda given: {} if re.fullmatch(rf"{name}(_\d+|_base)?", given) else None
