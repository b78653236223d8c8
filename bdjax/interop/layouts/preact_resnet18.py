"""Pre-activation ResNet-18: the names of BackdoorBench, WaNet and kuangliu, which are the same."""

from itertools import count

from bdjax.interop.layouts import _residual
from bdjax.interop.names import Naming, Options, Shapes


def _layers() -> dict[str, str]:
    """Return the table of names; the shortcut of a block is numbered before its convolutions."""
    conv, norm = count(), count()
    layers = {f"Conv_{next(conv)}": "conv1", "head": "linear"}
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            if stage > 1 and block == 0:
                layers[f"Conv_{next(conv)}"] = f"{at}.shortcut.0"
            for unit in (1, 2):
                layers[f"BatchNorm_{next(norm)}"] = f"{at}.bn{unit}"
                layers[f"Conv_{next(conv)}"] = f"{at}.conv{unit}"
    return layers


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    return {"pool": _residual.pools(shapes, 8 * shapes("Conv_0")[0], _residual.halved(min(size), 3))}


NAMINGS = (
    Naming(
        "preact_resnet18", "BackdoorBench", _layers(), side=32, options=_options, flattened=("head", "pooled"),
        name_options=lambda name: {} if name in ("preactresnet18", "preact_resnet_18") else None,
    ),
)  # fmt: skip
