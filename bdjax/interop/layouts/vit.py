"""Vision transformers: torchvision's names, and timm's, which DeiT uses."""

from collections.abc import Callable
from math import isqrt
from typing import Any

from bdjax.interop.names import Naming, Options, Shapes

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Usual number of heads by width; it does not follow from the shapes."""
_TIMM = (
    ("encoder.layers.encoder_layer_", "blocks."), (".self_attention.in_proj", ".attn.qkv"), (".ln_1", ".norm1"),
    (".self_attention.out_proj", ".attn.proj"), (".ln_2", ".norm2"), (".mlp.0", ".mlp.fc1"), (".mlp.3", ".mlp.fc2"),
    ("encoder.pos_embedding", "pos_embed"), ("encoder.ln", "norm"), ("class_token", "cls_token"),
)  # fmt: skip


def _old(name: str) -> str:
    """Convert to the names of torchvision's first version: `mlp.0` and `mlp.3` were `linear_1` and `linear_2`."""
    return name.replace(".mlp.0", ".mlp.linear_1").replace(".mlp.3", ".mlp.linear_2")


def _timm(name: str) -> str:
    """Convert to timm's names."""
    for part, torch_part in _TIMM:
        name = name.replace(part, torch_part)
    return name


def _side(shapes: Shapes) -> int:
    """Return the side of the images from the position embedding: one position per patch, one for the class token."""
    patches = shapes.named.get(shapes.naming.layer("encoder.pos_embedding"), (1, 1, 0))[1] - 1
    return isqrt(max(0, patches)) * shapes("conv_proj")[2]


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    width, depth = shapes("conv_proj")[0], 0
    while depth < 64 and shapes(f"encoder.layers.encoder_layer_{depth}.mlp.0"):
        depth += 1
    usual = _HEADS.get(width)
    if usual is None:
        usual = width // 64 if shapes.naming.label == "timm" and width % 64 == 0 else 12
    others = () if width in _HEADS else tuple(heads for heads in (3, 4, 6, 8, 12, 16) if width % heads == 0)
    return {"depth": (depth or 12,), "heads": (usual, *(heads for heads in others if heads != usual))}


_SHARED: dict[str, Any] = {"image_side": _side, "side_is_fixed": True, "options": _options}
_LAYERS = {"conv_proj": "conv_proj", "head": "heads.head"}


def _name_options(patch: int) -> Callable[[str], Options | None]:
    """Return the `name_options` of names such as vit_base_patch16_224 and deit_tiny_patch16_224."""
    return lambda name: {} if f"_patch{patch}_" in f"{name}_" else None


NAMINGS = tuple(
    naming
    for name, patch in (("vit_b_16", 16), ("vit_b_32", 32))
    for naming in (
        Naming(name, "torchvision", _LAYERS, **_SHARED),
        Naming(name, "torchvision's first version", _LAYERS, rename=_old, **_SHARED),
        Naming(
            name, "timm", {"conv_proj": "patch_embed.proj", "head": "head"}, rename=_timm,
            name_options=_name_options(patch), **_SHARED,
        ),
    )
)  # fmt: skip
