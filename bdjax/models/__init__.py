"""Classifiers as pure functions. This is the only package that uses Flax.

A model is a module with one Linen class `Net(classes, dtype, axis_name)`, whose call
`(images, train, keys) -> (logits, features)` accepts any H, W, C, and `SMALLEST`, the smallest side in pixels that its
down-sampling allows. If `Net` has the field `width`, this is the number of channels of the first convolution, and all
other layers scale with it. `VARIANTS`, if present, lists further options of `Net` (depth, stem, ...): names of fields
and their allowed values. `autoencoder`, `message_encoder`, `message_decoder`, `sampler` and `unet` create networks that
methods train. `dual_encoder` creates CLIP, which is no classifier (:mod:`bdjax.pair_types`).
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax import registry
from bdjax.errors import InputError
from bdjax.models._clip import PRESETS, ClipConfig, dual_encoder
from bdjax.models._generators import Generator, autoencoder, message_decoder, message_encoder, sampler, unet
from bdjax.models._input import MEANS, STDS, Input
from bdjax.models._layers import pooling_matrix
from bdjax.models._norms import norm_inputs, norm_kernels
from bdjax.models._variants import Variant, checked, variant
from bdjax.types import Images, Key, Model, Variables

__all__ = [
    "MEANS",
    "PRESETS",
    "STDS",
    "ClipConfig",
    "Generator",
    "Input",
    "as_dtype",
    "autoencoder",
    "create",
    "dual_encoder",
    "head",
    "kernels",
    "message_decoder",
    "message_encoder",
    "norm_inputs",
    "norm_kernels",
    "outputs",
    "penultimate",
    "pooling_matrix",
    "sampler",
    "unet",
    "variant",
    "with_kernels",
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
    """Create a model.

    Args:
      name: name of a module in bdjax.models, or the path of a .py file.
      shape: (H, W, C) of the images.
      classes: number of classes, at least 2.
      dtype: dtype of the activations (float32 or bfloat16); parameters and logits are float32.
      width: channels of the first convolution; None: the model's default.
      input: preprocessing inside the model; None: none.
      variant: options that differ from the model's defaults (see :func:`variant`).

    Returns:
      The model.

    Raises:
      InputError: when the name or an option is unknown, the images are too small, or there are fewer than two classes.
    """
    spec = registry.load("models", name)
    net_shape = shape if input is None else input.output_shape(shape)
    if min(net_shape[:2]) < spec.smallest:
        raise InputError(
            f"model {name!r} needs images of at least {spec.smallest}x{spec.smallest} pixels, "
            f"got {net_shape[0]}x{net_shape[1]}. Enlarge the images or choose another model "
            f"({', '.join(registry.names('models'))})."
        )
    if classes < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {classes}.")
    if input is not None:
        input.check(shape[2])
    if width is not None and not (spec.has_width and width >= 1):
        raise InputError(f"model {name!r} cannot have a width of {width} channels.")
    options = checked(spec, variant) | ({} if width is None else {"width": width})
    net = spec.Net(classes=classes, dtype=dtype, **options)
    init, apply, outputs = partial(_init, net, net_shape), partial(_apply, net, input), partial(_outputs, net, input)
    return Model(name, shape, classes, init, apply, outputs, (("width", width), ("input", input), ("variant", variant)))


def as_dtype(model: Model, dtype: Any) -> Model:
    """Return the same model with activations of another dtype."""
    return create(model.name, model.shape, model.classes, dtype, **dict(model.options))


def outputs(
    model: Model, variables: Variables, images: Images, train: bool = False, axis_name: str | None = None
) -> tuple[dict[str, jax.Array], Any]:
    """Compute the output of every convolution and dense layer.

    The outputs are in forward order; a jitted function that returns the dictionary sorts it.

    Args:
      model: a model.
      variables: its variables.
      images: float32 [N, H, W, C] in [0, 1].
      train: whether to use batch statistics.
      axis_name: mapped axis over which batch statistics are averaged, or None.

    Returns:
      (outputs by the path of the kernel, batch statistics), see :class:`bdjax.types.Model`.

    Raises:
      InputError: when the model does not provide them.
    """
    if model.outputs is None:
        raise InputError(
            f"model {model.name!r} does not provide the outputs of its layers (outputs is None), which this method "
            "needs. Use a model of bdjax.models."
        )
    return model.outputs(variables, images, train, axis_name)


def kernels(params: Any) -> dict[str, jax.Array]:
    """Return all leaves of the parameters by their path, such as "Conv_0/kernel"."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def with_kernels(params: Any, changed: Mapping[str, jax.Array]) -> Any:
    """Return the parameters with some leaves, given by path, replaced."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: changed.get(_path(path), leaf), params)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def penultimate(features: Mapping[str, jax.Array]) -> jax.Array:
    """Return the input of the last dense layer, [N, D]: the last entry of the features, flattened."""
    last = list(features.values())[-1]
    return last.reshape(len(last), -1)


def head(params: Any) -> jax.Array:
    """Return the kernel of the last dense layer, [D, classes]. Raises InputError for a model without layer "head"."""
    layer = params.get("head") if isinstance(params, Mapping) else None
    if not isinstance(layer, Mapping) or "kernel" not in layer:
        raise InputError(
            "the model has no dense layer named 'head', whose weights this method needs. Use another model."
        )
    return layer["kernel"]


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
    by_kernel: dict[str, jax.Array] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, nn.Conv | nn.Dense):
            by_kernel["/".join((*context.module.path, "kernel"))] = output
        return output

    with nn.intercept_methods(record):
        stats = _apply(net, input, variables, images, train, None, axis_name)[2]
    return by_kernel, stats
