"""Correspondence between the weights of bdjax's models and those of PyTorch networks: names, layouts, options.

The tables are the modules of :mod:`bdjax.interop.layouts`, one per family of networks; this module interprets them.

Each layer of bdjax has one counterpart in PyTorch:

    bdjax                         PyTorch                                  layout
    kernel of a convolution       weight                                   HWIO <-> OIHW
    kernel of a dense layer       weight (in_proj_weight of attention)     transposed
    ... after a flattening        weight                                   rows in HWC order <-> columns in CHW order
    scale, bias, mean, var        weight, bias, running_mean, running_var

Most models name their layers as torchvision does, and a table contains only the differences. The options of a network
other than its width (:mod:`bdjax.models`) are derived from the shapes in the file, else the usual value is assumed.
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
"""Options of a network with their possible values; the first value is the default."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of a file's tensors, accessed by bdjax's names of the layers."""

    naming: "Naming"
    named: Mapping[str, tuple[int, ...]]
    """Shapes by the names in the file."""

    def __call__(self, layer: str, leaf: str = "weight") -> tuple[int, ...]:
        """Return the shape of a layer's tensor in PyTorch's layout, or () when there is none."""
        return self.named.get(f"{self.naming.layer(layer)}.{leaf}", ())


@dataclass(frozen=True)
class Naming:
    """Layer names of one PyTorch implementation of a model of bdjax."""

    model: str
    """Name in bdjax.models."""
    label: str
    """Name of the implementation, such as "torchvision"."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Layer name in bdjax -> in PyTorch; other layers are renamed by `rename`."""
    rename: Callable[[str], str] = str
    """Layer name in bdjax -> in PyTorch, for the layers that are not in `layers`."""
    flattened: tuple[str, str] | None = None
    """The dense layer whose input is a flattened feature, and the name of that feature."""
    side: int = 224
    """Default side of the images in pixels."""
    image_side: Callable[[Shapes], int] = lambda of: 0
    """`image_side(shapes) -> side` of the images that the weights are for; 0 where any size fits."""
    side_is_fixed: bool = False
    """Whether the weights fit only this side, so that other images must be resized."""
    ignored: tuple[str, ...] = ()
    """Prefixes of PyTorch tensors without a counterpart that do not influence the network's output."""
    first: str = ""
    """Name in bdjax of the first convolution, which determines width and channels; default: the first in `layers`."""
    convolved: tuple[str, ...] = ()
    """Dense layers of bdjax that are convolutions in PyTorch: 1x1, or of the size of the `flattened` feature."""
    options: Callable[[Shapes, tuple[int, int]], Options] = lambda of, size: {}
    """`options(shapes, (H, W) of the images) -> Options` of the network in the file."""
    name_options: Callable[[str], Options | None] = lambda name: None
    """`name_options(name) -> Options` that a network's name (lower case, with underscores) implies, or None when it is
    the name of another family. Not needed for the name in bdjax.models."""
    note: str = ""
    """What bdjax's version of the network omits, in words for the user."""

    def layer(self, name: str) -> str:
        """Return PyTorch's name of a layer of bdjax."""
        return self.layers.get(name) or self.rename(name)

    def options_of_name(self, name: str) -> Options | None:
        """Return the options that a network's name implies, or None when it is the name of another network."""
        return {} if name == self.model else self.name_options(name)

    @property
    def first_weight(self) -> str:
        """PyTorch's name of the weight of the first convolution."""
        return f"{self.layer(self.first or next(iter(self.layers)))}.weight"


class Entry(NamedTuple):
    """An array of bdjax and its PyTorch counterpart."""

    path: tuple[str, ...]
    """Path in the variables: collection, layer, name."""
    name: str
    """Name in PyTorch, without a prefix."""
    shape: tuple[int, ...]
    """Shape in PyTorch."""
    to_bdjax: Callable[[Any], Any]
    """Converts an array from PyTorch's layout, as a view where possible."""
    to_torch: Callable[[Any], Any]
    """Converts an array to PyTorch's layout."""


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"
"""Step counter of PyTorch's batch normalisation, which does not influence the output."""


def entries(naming: Naming, model: Model) -> list[Entry]:
    """Return every array of a model with its PyTorch counterpart, in the order of the model's layers."""
    like, flat, pairs = variable_shapes(model), None, []
    pooled = dict(model.options)["variant"] if model.options else ()
    if naming.flattened and (naming.flattened[1] != "pooled" or dict(pooled).get("pool")):
        images = jax.ShapeDtypeStruct((1, *model.shape), np.float32)
        feature = jax.eval_shape(lambda v, x: model.apply(v, x)[1], like, images).get(naming.flattened[1])
        flat = None if feature is None else feature.shape[1:]
    for collection, layers in like.items():
        for layer, arrays in layers.items():
            for leaf, array in arrays.items() if isinstance(arrays, Mapping) else (("", arrays),):
                path = (collection, layer, leaf) if leaf else (collection, layer)
                shape = flat if naming.flattened and (layer, leaf) == (naming.flattened[0], "kernel") else None
                convolved = leaf == "kernel" and layer in naming.convolved
                pairs.append(entry(path, naming.layer(layer), leaf, tuple(array.shape), shape, convolved))
    return pairs


@lru_cache(maxsize=16)
def variable_shapes(model: Model) -> Any:
    """Return the shapes and dtypes of a model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0))


def entry(
    path: tuple[str, ...], layer: str, leaf: str, shape: tuple[int, ...], flat: tuple[int, ...] | None, convolved: bool
) -> Entry:
    """Return the counterpart of one array in PyTorch's usual layout.

    Args:
      path: its path in the variables.
      layer: name of its layer in PyTorch.
      leaf: "kernel", "scale", "bias", "mean" or "var"; "" for an array without a layer.
      shape: its shape.
      flat: shape (H, W, C) of the feature that was flattened before this dense layer; None otherwise.
      convolved: whether the dense layer is a 1x1 convolution in PyTorch.

    Returns:
      The counterpart.
    """
    name = layer if not leaf else f"{layer}{'_' if layer.endswith('in_proj') else '.'}{_LEAVES[leaf]}"
    if leaf != "kernel":
        return Entry(path, name, shape, lambda a: a, lambda a: a)
    if len(shape) == 4:
        oihw = shape[3], shape[2], shape[0], shape[1]
        return Entry(path, name, oihw, lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
    if flat is None and not convolved:
        return Entry(path, name, shape[::-1], lambda a: a.T, lambda a: a.T)
    height, width, channels = flat or (1, 1, shape[0])
    torch_shape: tuple[int, ...] = (shape[1], channels, height, width) if convolved else shape[::-1]
    return Entry(
        path,
        name,
        torch_shape,
        lambda a: a.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(shape),
        lambda a: a.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(torch_shape),
    )


@cache
def _all() -> tuple[Naming, ...]:
    """Return all tables, by module name."""
    modules = sorted(m.name for m in pkgutil.iter_modules(layouts.__path__) if not m.name.startswith("_"))
    return tuple(
        naming for module in modules for naming in importlib.import_module(f"{layouts.__name__}.{module}").NAMINGS
    )


def families() -> tuple[str, ...]:
    """Return the names in bdjax.models of all models with a table."""
    return tuple(sorted({naming.model for naming in _all()}))


def family(name: str) -> str:
    """Normalise a model's name: lower case, underscores, without a data set before it or a weight tag after it.

    For example, timm's `resnet18.a1_in1k` becomes `resnet18`. The path of a .py file is returned unchanged.
    """
    if name.endswith(".py"):
        return name
    return re.sub(r"^cifar(10|100)?_(?=.)", "", name.lower().replace("-", "_").partition(".")[0])


def is_known(name: str) -> bool:
    """Whether networks of that name can be read."""
    return any(naming.options_of_name(name) is not None for naming in _all())


def namings(name: str) -> tuple[Naming, ...]:
    """Return the tables for networks of a name, the usual one first. Raises InputError when the name is unknown.

    A model without a table is exchanged under bdjax's names.
    """
    if tables := tuple(naming for naming in _all() if naming.options_of_name(name) is not None):
        return tuple(sorted(tables, key=lambda naming: naming.model != name))
    registry.check("models", name)
    return (Naming(name, "bdjax", first="Conv_0", side=32),)


def namings_of_model(model: str) -> tuple[Naming, ...]:
    """Return the tables of a model of bdjax; one with bdjax's own names when it has none."""
    return tuple(naming for naming in namings(model) if naming.model == model)


def export_naming(model: str) -> Naming:
    """Return the table for exporting a model that was not imported: torchvision's where there is one."""
    tables = namings_of_model(model)
    return next((naming for naming in tables if naming.label == "torchvision" and model != "resnet18"), tables[0])
