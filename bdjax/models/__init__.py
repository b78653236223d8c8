"""Classifiers as pure functions. `create(name, ...)` finds the module of that name; Flax stays in here.

A model module holds one Linen class `Net(classes, dtype, axis_name)` whose call
`(images, train, keys) -> (logits, features)` takes any H, W, C, and `SMALLEST`, the least side in
pixels that its down-sampling allows. A `Net` with the field `width` can be had narrower or wider: it is the number of
channels that its first convolution makes, and the others keep their ratio to it. `VARIANTS`, where a module has it,
says what else a `Net` can be had with (its depth, its stem): the names of fields, and the values that they may have.
`autoencoder`, `message_encoder`, `message_decoder`, `sampler` and `unet` are networks that methods train.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax import registry
from bdjax.errors import InputError
from bdjax.models._generators import Generator, autoencoder, message_encoder, message_decoder, sampler, unet
from bdjax.models._input import MEANS, STDS, Input
from bdjax.models._norms import norm_inputs, norm_kernels
from bdjax.models._variants import Variant, checked, variant
from bdjax.types import Images, Key, Model, Variables

__all__ = [
    "MEANS", "STDS", "Generator", "Input", "as_dtype", "autoencoder", "create", "norm_inputs", "norm_kernels", "head", "message_encoder",
    "kernels", "outputs", "penultimate", "message_decoder", "sampler", "unet", "variant", "with_kernels",
]  # fmt: skip


@lru_cache
def create(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    dtype: Any = jnp.float32,
    width: int | None = None,
    input: Input | None = None,
    variant: Variant = (),
) -> Model:
    """The model `name` for images of `shape` (H, W, C) and `classes` outputs.

    `dtype` is what activations are computed in (float32 or bfloat16); parameters and logits stay float32. `width`:
    channels of the first convolution, default the model's own; `input`: what is done to images first; `variant`: the
    options of :func:`variant` that differ from the model's own.
    Raises InputError for an unknown name or option, for images too small, and for fewer than two classes.
    """
    spec = registry.load("models", name)
    seen = shape if input is None else input.seen(shape)
    if min(seen[:2]) < spec.smallest:
        raise InputError(
            f"model {name!r} needs images of at least {spec.smallest}x{spec.smallest} pixels, "
            f"got {seen[0]}x{seen[1]}. Enlarge the images or choose another model "
            f"({', '.join(registry.names('models'))})."
        )
    if classes < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {classes}.")
    if input is not None:
        input.check(shape[2])
    if width is not None and not (spec.has_width and width >= 1):
        raise InputError(f"model {name!r} cannot be had {width} channels wide.")
    options = checked(spec, variant) | ({} if width is None else {"width": width})
    net = spec.Net(classes=classes, dtype=dtype, **options)
    init, apply, outputs = partial(_init, net, seen), partial(_apply, net, input), partial(_outputs, net, input)
    return Model(name, shape, classes, init, apply, outputs, (("width", width), ("input", input), ("variant", variant)))


def as_dtype(model: Model, dtype: Any) -> Model:
    """A model of :func:`create` that computes in another type."""
    return create(model.name, model.shape, model.classes, dtype, **dict(model.options))


def outputs(
    model: Model, variables: Variables, images: Images, train: bool = False, axis_name: str | None = None
) -> tuple[dict[str, jax.Array], Any]:
    """What every convolution and dense layer gives, and the statistics: see :class:`bdjax.types.Model`.

    The order is that of the forward pass; a program that returns the dictionary sorts it. Raises InputError for a model
    that does not tell.
    """
    if model.outputs is None:
        raise InputError(
            f"model {model.name!r} does not tell what its layers give (outputs is None), which this method needs. "
            "Use a model of bdjax.models."
        )
    return model.outputs(variables, images, train, axis_name)


def kernels(params: Any) -> dict[str, jax.Array]:
    """All leaves of the parameters by their path, as "Conv_0/kernel"."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def with_kernels(params: Any, changed: Mapping[str, jax.Array]) -> Any:
    """The parameters with the leaves of `changed`, by path, in place of their own."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: changed.get(_path(path), leaf), params)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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


def _outputs(
    net: Any,
    input: Input | None,
    variables: Variables,
    images: Images,
    train: bool = False,
    axis_name: str | None = None,
) -> tuple[dict[str, jax.Array], Any]:
    found: dict[str, jax.Array] = {}

    def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        given = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, nn.Conv | nn.Dense):
            found["/".join((*context.module.path, "kernel"))] = given
        return given

    with nn.intercept_methods(keep):
        stats = _apply(net, input, variables, images, train, None, axis_name)[2]
    return found, stats
