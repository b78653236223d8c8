"""The vision transformers of torchvision, and timm's names for them, which DeiT has."""

from collections.abc import Callable
from math import isqrt
from typing import Any

from bdjax.interop.names import Naming, Options, Shapes

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""By width, of the sizes in use; heads have no weights of their own."""
_TIMM = (
    ("encoder.layers.encoder_layer_", "blocks."), (".self_attention.in_proj", ".attn.qkv"), (".ln_1", ".norm1"),
    (".self_attention.out_proj", ".attn.proj"), (".ln_2", ".norm2"), (".mlp.0", ".mlp.fc1"), (".mlp.3", ".mlp.fc2"),
    ("encoder.pos_embedding", "pos_embed"), ("encoder.ln", "norm"), ("class_token", "cls_token"),
)  # fmt: skip


def _old(ours: str) -> str:
    """`mlp.0` and `mlp.3` were called `linear_1` and `linear_2`."""
    return ours.replace(".mlp.0", ".mlp.linear_1").replace(".mlp.3", ".mlp.linear_2")


def _timm(ours: str) -> str:
    for part, theirs in _TIMM:
        ours = ours.replace(part, theirs)
    return ours


def _side(of: Shapes) -> int:
    """One position for each patch, and one for the class token."""
    patches = of.named.get(of.naming.layer("encoder.pos_embedding"), (1, 1, 0))[1] - 1
    return isqrt(max(0, patches)) * of("conv_proj")[2]


def _options(of: Shapes, size: tuple[int, int]) -> Options:
    width, depth = of("conv_proj")[0], 0
    while depth < 64 and of(f"encoder.layers.encoder_layer_{depth}.mlp.0"):
        depth += 1
    usual = _HEADS.get(width)
    if usual is None:
        usual = width // 64 if of.naming.label == "timm" and width % 64 == 0 else 12
    others = () if width in _HEADS else tuple(heads for heads in (3, 4, 6, 8, 12, 16) if width % heads == 0)
    return {"depth": (depth or 12,), "heads": (usual, *(heads for heads in others if heads != usual))}


_SHARED: dict[str, Any] = {"image_side": _side, "side_is_fixed": True, "options": _options}
_LAYERS = {"conv_proj": "conv_proj", "head": "heads.head"}


def _called(patch: int) -> Callable[[str], Options | None]:
    """vit_base_patch16_224, deit_tiny_patch16_224."""
    return lambda name: {} if f"_patch{patch}_" in f"{name}_" else None


NAMINGS = tuple(
    naming
    for name, patch in (("vit_b_16", 16), ("vit_b_32", 32))
    for naming in (
        Naming(name, "torchvision", _LAYERS, **_SHARED),
        Naming(name, "torchvision's first version", _LAYERS, rename=_old, **_SHARED),
        Naming(
            name, "timm", {"conv_proj": "patch_embed.proj", "head": "head"}, rename=_timm,
            name_options=_called(patch), **_SHARED,
        ),
    )
)  # fmt: skip
