"""What PyTorch calls the weights of each model, and how it lays them out: one table a family, read in both directions.

A layer of bdjax has one counterpart; what it holds follows from its kind:

    here                          there                                    layout
    kernel of a convolution       weight                                   HWIO <-> OIHW
    kernel of a dense layer       weight (in_proj_weight of attention)     transposed
    after a flattening            weight                                   rows in HWC order <-> columns in CHW order
    scale, bias, mean, var        weight, bias, running_mean, running_var

The younger models name their layers as torchvision does, and a table has what differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from math import isqrt
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax import registry
from bdjax.types import Model


@dataclass(frozen=True)
class Naming:
    """How one sort of PyTorch network calls the layers of one of our models."""

    model: str
    """Name in bdjax.models."""
    label: str
    """Whose names they are."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Our layer -> theirs; what is not in it has the same name."""
    rename: Callable[[str], str] = str
    """Of the other layers: ours -> theirs."""
    flattened: tuple[str, str] | None = None
    """The dense layer that reads a flattened feature, and the name of that feature."""
    side: int = 224
    """Of the images, in pixels, where nothing else tells it."""
    measured: Callable[[Mapping[str, tuple[int, ...]]], int] = lambda shapes: 0
    """`measured(their shapes by name) -> side` of the images that the weights are for; 0 where they fit any."""
    ignored: tuple[str, ...] = ()
    """How their names begin that have no counterpart here and no part in what the network computes."""
    first: str = ""
    """Our name of the convolution that sees the image: it tells width and channels; default the first in `layers`."""

    def layer(self, ours: str) -> str:
        """Their name of a layer."""
        return self.layers.get(ours) or self.rename(ours)

    @property
    def first_weight(self) -> str:
        """Their name of the first convolution's weights."""
        return f"{self.layer(self.first or next(iter(self.layers)))}.weight"


class Entry(NamedTuple):
    """One array here and its counterpart there."""

    path: tuple[str, ...]
    """In the variables: collection, layer, name."""
    name: str
    """There, without any prefix."""
    shape: tuple[int, ...]
    """There."""
    back: Callable[[Any], Any]
    """Theirs -> ours: a view where it can be."""
    forth: Callable[[Any], Any]
    """Ours -> theirs."""


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"
"""Of a batch normalisation there, which counts steps and changes nothing."""


def entries(naming: Naming, model: Model) -> list[Entry]:
    """Every array of `model` with its counterpart, in the order of the model's layers."""
    like, flat, found = like_of(model), None, []
    if naming.flattened:
        images = jax.ShapeDtypeStruct((1, *model.shape), np.float32)
        flat = jax.eval_shape(lambda v, x: model.apply(v, x)[1], like, images)[naming.flattened[1]].shape[1:]
    for collection, layers in like.items():
        for layer, held in layers.items():
            for leaf, array in held.items() if isinstance(held, Mapping) else (("", held),):
                path = (collection, layer, leaf) if leaf else (collection, layer)
                shape = flat if naming.flattened and (layer, leaf) == (naming.flattened[0], "kernel") else None
                found.append(_entry(path, naming.layer(layer), leaf, tuple(array.shape), shape))
    return found


@lru_cache(maxsize=16)
def like_of(model: Model) -> Any:
    """Shapes and types of a model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0))


def _entry(path: tuple[str, ...], layer: str, leaf: str, shape: tuple[int, ...], flat: tuple[int, ...] | None) -> Entry:
    name = layer if not leaf else f"{layer}{'_' if layer.endswith('in_proj') else '.'}{_LEAVES[leaf]}"
    if leaf != "kernel":
        return Entry(path, name, shape, lambda a: a, lambda a: a)
    if len(shape) == 4:
        theirs = shape[3], shape[2], shape[0], shape[1]
        return Entry(path, name, theirs, lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
    if flat is None:
        return Entry(path, name, shape[::-1], lambda a: a.T, lambda a: a.T)
    height, width, channels = flat
    return Entry(
        path,
        name,
        shape[::-1],
        lambda a: a.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(shape),
        lambda a: a.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(shape[::-1]),
    )


def _resnet(shortcut: str, head: str) -> dict[str, str]:
    """ResNet-18: ours are numbered as the network is built; `shortcut`.0 and .1 follow the convolutions of a block."""
    conv, norm = count(), count()
    found = {f"Conv_{next(conv)}": "conv1", f"BatchNorm_{next(norm)}": "bn1", "head": head}
    for stage in range(1, 5):
        for block in range(2):
            units = [("conv1", "bn1"), ("conv2", "bn2")]
            if stage > 1 and block == 0:
                units.append((f"{shortcut}.0", f"{shortcut}.1"))
            for convolution, normalisation in units:
                found[f"Conv_{next(conv)}"] = f"layer{stage}.{block}.{convolution}"
                found[f"BatchNorm_{next(norm)}"] = f"layer{stage}.{block}.{normalisation}"
    return found


def _preact() -> dict[str, str]:
    """Pre-activation ResNet-18: the shortcut, where there is one, is built before the block's convolutions."""
    conv, norm = count(), count()
    found = {f"Conv_{next(conv)}": "conv1", "head": "linear"}
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            if stage > 1 and block == 0:
                found[f"Conv_{next(conv)}"] = f"{at}.shortcut.0"
            for unit in (1, 2):
                found[f"BatchNorm_{next(norm)}"] = f"{at}.bn{unit}"
                found[f"Conv_{next(conv)}"] = f"{at}.conv{unit}"
    return found


def _small_vgg(dropout: bool, head: str) -> dict[str, str]:
    """Three blocks of twice conv, BatchNorm, ELU, then pooling and, if it is a module of its own, dropout."""
    found, place = {}, 0
    for unit in range(6):
        found[f"Conv_{unit}"], found[f"BatchNorm_{unit}"] = f"features.{place}", f"features.{place + 1}"
        place += 3 + (1 + dropout if unit % 2 else 0)
    return {**found, "head": head}


def _old_densenet(ours: str) -> str:
    """`denselayer1.norm1` was `denselayer1.norm.1` in torchvision's first weights."""
    return f"{ours[:-1]}.{ours[-1]}" if ".denselayer" in ours else ours


def _old_vit(ours: str) -> str:
    """`mlp.0` and `mlp.3` were called `linear_1` and `linear_2`."""
    return ours.replace(".mlp.0", ".mlp.linear_1").replace(".mlp.3", ".mlp.linear_2")


def _small_vgg_side(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Three poolings leave an eighth of the side; the dense layer reads what is left of each channel."""
    head = next((shape for name, shape in shapes.items() if name.startswith("classifier") and len(shape) == 2), (0, 0))
    places = head[1] // (4 * shapes["features.0.weight"][0])
    return 8 * isqrt(places) if isqrt(places) ** 2 == places else 0


def vit_side(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """One position for each patch, and one for the class token."""
    patches = shapes.get("encoder.pos_embedding", (1, 1, 0))[1] - 1
    return isqrt(patches) * shapes["conv_proj.weight"][2]


_SMALL_VGG: dict[str, Any] = {"flattened": ("head", "block3"), "side": 32, "measured": _small_vgg_side}
_VGG: dict[str, Any] = {
    "layers": {"features.0": "features.0", "head": "classifier.6"},
    "flattened": ("classifier.0", "pool"),
}
_DENSE: dict[str, Any] = {"layers": {"features.conv0": "features.conv0", "head": "classifier"}}
_VIT: dict[str, Any] = {"layers": {"conv_proj": "conv_proj", "head": "heads.head"}, "measured": vit_side}
_TABLES: dict[str, tuple[Naming, ...]] = {
    "small_vgg": tuple(
        Naming("small_vgg", f"{label}{more}", _small_vgg(dropout, f"classifier{more}"), **_SMALL_VGG)
        for dropout, label in ((True, "I-BAU's release"), (False, "modules without dropout"))
        for more in ("", ".0", ".1")
    ),
    "resnet18": tuple(
        Naming(model, label, _resnet(shortcut, head), side=side)
        for shortcut, head, label in (
            ("shortcut", "linear", "the CIFAR networks'"),
            ("downsample", "fc", "torchvision"),
            ("shortcut", "fc", "shortcut and fc"),
            ("downsample", "linear", "downsample and linear"),
        )
        for model, side in (("resnet18", 32), ("resnet18_imagenet", 224))
    ),
    "preact_resnet18": (Naming("preact_resnet18", "BackdoorBench", _preact(), side=32),),
    **{name: (Naming(name, "torchvision", **_VGG),) for name in ("vgg16", "vgg19", "vgg16_bn", "vgg19_bn")},
    "mobilenet_v3_small": (
        Naming("mobilenet_v3_small", "torchvision", {"features.0.0": "features.0.0", "head": "classifier.3"}),
    ),
    "efficientnet_v2_s": (
        Naming("efficientnet_v2_s", "torchvision", {"features.0.0": "features.0.0", "head": "classifier.1"}),
    ),
    "densenet121": (
        Naming("densenet121", "torchvision", **_DENSE),
        Naming("densenet121", "torchvision's first weights", rename=_old_densenet, **_DENSE),
    ),
    "googlenet": (
        Naming("googlenet", "torchvision", {"conv1.conv": "conv1.conv", "head": "fc"}, ignored=("aux1.", "aux2.")),
    ),
    **{
        name: (
            Naming(name, "torchvision", **_VIT),
            Naming(name, "torchvision's first version", rename=_old_vit, **_VIT),
        )
        for name in ("vit_b_16", "vit_b_32")
    },
}
FAMILIES = tuple(sorted(_TABLES))
_CALLED = {"preactresnet18": "preact_resnet18"}


def family(called: str) -> str:
    """Our name of a model that a file or a user calls so: the same but for a few."""
    return _CALLED.get(called.lower().replace("-", "_"), called.lower().replace("-", "_"))


def namings(model: str) -> tuple[Naming, ...]:
    """How networks that fit `model` may call their layers; the usual one first. Raises InputError when it is unknown.

    A model without a table is exchanged under its own names.
    """
    if model == "resnet18_imagenet":
        return tuple(naming for naming in _TABLES["resnet18"] if naming.model == model)
    if model in _TABLES:
        return _TABLES[model]
    registry.check("models", model)
    return (Naming(model, "bdjax", first="Conv_0", side=32),)


def usual(model: str) -> Naming:
    """The names that a model is exported with when it did not come from a file."""
    found = [naming for naming in namings(model) if naming.model == model]
    return next((naming for naming in found if naming.label == "torchvision" and model != "resnet18"), found[0])
