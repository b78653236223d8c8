"""SENet-18: kuangliu's names."""

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    width, inner = shapes("conv1")[0], shapes("layer4.0.fc1")
    reduction = 8 * width // inner[0] if inner and inner[0] else 16
    return {
        "preact": (not shapes("layer2.0.shortcut.1"),),
        "reduction": (min(64, max(1, reduction)),),
        "pool": _residual.pools(shapes, 8 * width, _residual.halved(min(size), 3)),
    }


NAMINGS = (
    Naming(
        "senet18", "kuangliu", {"head": "linear"}, first="conv1", side=32, options=_options,
        flattened=("head", "pooled"),
        name_options=lambda name: {} if name in ("senet", "senet_18", "se_resnet18", "seresnet18") else None,
    ),
)  # fmt: skip
