"""Classifiers as pure functions. `create(name, ...)` finds the module of that name; Flax stays in here.

A model module holds one Linen class `Net(classes, dtype, axis_name)` whose call
`(images, train, keys) -> (logits, features)` takes any H, W, C, and `SMALLEST`, the least side in
pixels that its down-sampling allows. A `Net` with the field `width` can be had narrower or wider: it is the number of
channels that its first convolution makes, and the others keep their ratio to it.
`autoencoder`, `hider` and `reader` are networks that attacks train.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from bdjax import registry
from bdjax.errors import InputError
from bdjax.models._generators import Generator, autoencoder, hider, reader
from bdjax.models._input import Input
from bdjax.types import Images, Key, Model, Variables

__all__ = ["Generator", "Input", "autoencoder", "create", "hider", "reader"]


@lru_cache
def create(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    dtype: Any = jnp.float32,
    width: int | None = None,
    input: Input | None = None,
) -> Model:
    """The model `name` for images of `shape` (H, W, C) and `classes` outputs.

    `dtype` is what activations are computed in (float32 or bfloat16); parameters and logits stay float32. `width`:
    channels of the first convolution, default the model's own; `input`: what is done to images first.
    Raises InputError for an unknown name, for images too small, and for fewer than two classes.
    """
    module = registry.load("models", name)
    seen = shape if input is None else input.seen(shape)
    if min(seen[:2]) < module.SMALLEST:
        raise InputError(
            f"model {name!r} needs images of at least {module.SMALLEST}x{module.SMALLEST} pixels, "
            f"got {seen[0]}x{seen[1]}. Enlarge the images or choose another model "
            f"({', '.join(registry.names('models'))})."
        )
    if classes < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {classes}.")
    if input is not None:
        input.check(shape[2])
    if width is not None and not (hasattr(module.Net, "width") and width >= 1):
        raise InputError(f"model {name!r} cannot be had {width} channels wide.")
    net = module.Net(classes=classes, dtype=dtype, **({} if width is None else {"width": width}))
    init, apply = partial(_init, net, seen), partial(_apply, net, input)
    return Model(name, shape, classes, init, apply, (("width", width), ("input", input)))


def as_dtype(model: Model, dtype: Any) -> Model:
    """A model of :func:`create` that computes in another type."""
    return create(model.name, model.shape, model.classes, dtype, **dict(model.options))


def penultimate(features: Mapping[str, jax.Array]) -> jax.Array:
    """What the last dense layer sees, [N, D]: the last entry of the features that `apply` gives, flattened."""
    last = list(features.values())[-1]
    return last.reshape(len(last), -1)


def head(params: Any) -> jax.Array:
    """The kernel of the last dense layer, [D, classes]. Raises InputError for a model without a layer "head"."""
    found = params.get("head") if isinstance(params, Mapping) else None
    if not isinstance(found, Mapping) or "kernel" not in found:
        raise InputError(
            "the model has no dense layer named 'head', which this method reads the weights of. Use another model."
        )
    return found["kernel"]


def _init(net: Any, shape: tuple[int, int, int], key: Key) -> Variables:
    variables = net.init(key, jnp.zeros((1, *shape), jnp.float32))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _apply(
    net: Any,
    input: Input | None,
    variables: Variables,
    images: Images,
    train: bool = False,
    keys: Key | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    if input is not None:
        images = input(images)
    with jax.numpy_dtype_promotion("standard"):  # BatchNorm mixes bfloat16 activations with float32 statistics
        if not train:
            logits, features = net.apply(variables, images)
            return logits, features, variables["batch_stats"]
        net = net.clone(axis_name=axis_name)
        (logits, features), state = net.apply(variables, images, True, keys, mutable=["batch_stats"])
    return logits, features, state.get("batch_stats", variables["batch_stats"])
