"""What PyTorch calls the weights of each model, and how it lays them out: read in both directions.

The tables are the modules of :mod:`bdjax.interop.layouts`, one for each family; this is how a table is read.

A layer of bdjax has one counterpart; what it holds follows from its kind:

    here                          there                                    layout
    kernel of a convolution       weight                                   HWIO <-> OIHW
    kernel of a dense layer       weight (in_proj_weight of attention)     transposed
    after a flattening            weight                                   rows in HWC order <-> columns in CHW order
    scale, bias, mean, var        weight, bias, running_mean, running_var

The younger models name their layers as torchvision does, and a table has what differs. What a network can be had with
beside its width (:mod:`bdjax.models`) is read from the shapes in the file, and what they do not tell is assumed.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax import registry
from bdjax.interop import layouts
from bdjax.types import Model

Options = Mapping[str, tuple[Any, ...]]
"""Of a network, each with the values that it may have; the first is assumed where nothing else tells it."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of a file's tensors, by what we call the layers."""

    naming: "Naming"
    named: Mapping[str, tuple[int, ...]]
    """By their own names."""

    def __call__(self, layer: str, leaf: str = "weight") -> tuple[int, ...]:
        """Of a layer's tensor, as it lies in the file; () where there is none."""
        return self.named.get(f"{self.naming.layer(layer)}.{leaf}", ())


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
    image_side: Callable[[Shapes], int] = lambda of: 0
    """`measured(their shapes) -> side` of the images that the weights are for; 0 where they fit any."""
    side_is_fixed: bool = False
    """The weights fit no other side, so that an owner of other images enlarged or reduced them."""
    ignored: tuple[str, ...] = ()
    """How their names begin that have no counterpart here and no part in what the network computes."""
    first: str = ""
    """Our name of the convolution that sees the image: it tells width and channels; default the first in `layers`."""
    convolved: tuple[str, ...] = ()
    """Our dense layers that are convolutions there: 1x1, or as large as the feature that `flattened` names."""
    options: Callable[[Shapes, tuple[int, int]], Options] = lambda of, size: {}
    """`options(their shapes, (H, W) of the images) -> Options`: what the network was had with."""
    name_options: Callable[[str], Options | None] = lambda name: None
    """`called(name)` of a network, in small letters with underscores -> the options that it says, or None when it is of
    another family. The name in bdjax.models needs none."""
    note: str = ""
    """What of the network is left out here, in words for its owner."""

    def layer(self, ours: str) -> str:
        """Their name of a layer."""
        return self.layers.get(ours) or self.rename(ours)

    def options_of_name(self, called: str) -> Options | None:
        """What a name for a network says of it; None when it is the name of another."""
        return {} if called == self.model else self.name_options(called)

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
    to_bdjax: Callable[[Any], Any]
    """Theirs -> ours: a view where it can be."""
    to_torch: Callable[[Any], Any]
    """Ours -> theirs."""


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"
"""Of a batch normalisation there, which counts steps and changes nothing."""


def entries(naming: Naming, model: Model) -> list[Entry]:
    """Every array of `model` with its counterpart, in the order of the model's layers."""
    like, flat, found = variable_shapes(model), None, []
    pooled = dict(model.options)["variant"] if model.options else ()
    if naming.flattened and (naming.flattened[1] != "pooled" or dict(pooled).get("pool")):
        images = jax.ShapeDtypeStruct((1, *model.shape), np.float32)
        feature = jax.eval_shape(lambda v, x: model.apply(v, x)[1], like, images).get(naming.flattened[1])
        flat = None if feature is None else feature.shape[1:]
    for collection, layers in like.items():
        for layer, held in layers.items():
            for leaf, array in held.items() if isinstance(held, Mapping) else (("", held),):
                path = (collection, layer, leaf) if leaf else (collection, layer)
                shape = flat if naming.flattened and (layer, leaf) == (naming.flattened[0], "kernel") else None
                convolved = leaf == "kernel" and layer in naming.convolved
                found.append(_entry(path, naming.layer(layer), leaf, tuple(array.shape), shape, convolved))
    return found


@lru_cache(maxsize=16)
def variable_shapes(model: Model) -> Any:
    """Shapes and types of a model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0))


def _entry(
    path: tuple[str, ...], layer: str, leaf: str, shape: tuple[int, ...], flat: tuple[int, ...] | None, convolved: bool
) -> Entry:
    name = layer if not leaf else f"{layer}{'_' if layer.endswith('in_proj') else '.'}{_LEAVES[leaf]}"
    if leaf != "kernel":
        return Entry(path, name, shape, lambda a: a, lambda a: a)
    if len(shape) == 4:
        turned = shape[3], shape[2], shape[0], shape[1]
        return Entry(path, name, turned, lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
    if flat is None and not convolved:
        return Entry(path, name, shape[::-1], lambda a: a.T, lambda a: a.T)
    height, width, channels = flat or (1, 1, shape[0])
    theirs: tuple[int, ...] = (shape[1], channels, height, width) if convolved else shape[::-1]
    return Entry(
        path,
        name,
        theirs,
        lambda a: a.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(shape),
        lambda a: a.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(theirs),
    )


@cache
def _all() -> tuple[Naming, ...]:
    """Every table: the modules of the folder in the order of their names."""
    modules = sorted(m.name for m in pkgutil.iter_modules(layouts.__path__) if not m.name.startswith("_"))
    return tuple(
        naming for module in modules for naming in importlib.import_module(f"{layouts.__name__}.{module}").NAMINGS
    )


def families() -> tuple[str, ...]:
    """Our names of the models that have a table."""
    return tuple(sorted({naming.model for naming in _all()}))


def family(called: str) -> str:
    """What a file or a user calls a model, as the tables have it: small letters, underscores, no data set before it and
    no name of weights behind it (timm's `resnet18.a1_in1k`)."""
    if called.endswith(".py"):
        return called
    return re.sub(r"^cifar(10|100)?_(?=.)", "", called.lower().replace("-", "_").partition(".")[0])


def is_known(called: str) -> bool:
    """Whether networks of that name can be read."""
    return any(naming.options_of_name(called) is not None for naming in _all())


def namings(called: str) -> tuple[Naming, ...]:
    """How networks of that name may call their layers; the usual one first. Raises InputError when it is unknown.

    A model without a table is exchanged under its own names.
    """
    if found := tuple(naming for naming in _all() if naming.options_of_name(called) is not None):
        return tuple(sorted(found, key=lambda naming: naming.model != called))
    registry.check("models", called)
    return (Naming(called, "bdjax", first="Conv_0", side=32),)


def namings_of_model(model: str) -> tuple[Naming, ...]:
    """The tables of one of our models; a model without one has its own names."""
    return tuple(naming for naming in namings(model) if naming.model == model)


def export_naming(model: str) -> Naming:
    """The names that a model is exported with when it did not come from a file."""
    found = namings_of_model(model)
    return next((naming for naming in found if naming.label == "torchvision" and model != "resnet18"), found[0])
