"""Inspection of batch-normalisation layers: their inputs, and the convolutions that they follow."""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from bdjax.types import Images, Model, Variables

_OUTPUT, _INPUT = "bdjax output ", "bdjax input "


def norm_inputs(model: Model, variables: Variables, images: Images, reduce: Callable) -> dict[str, Any]:
    """Compute a reduction of the input of each batch-normalisation layer in evaluation mode.

    Args:
      model: a model.
      variables: its variables.
      images: float32 [N, H, W, C].
      reduce: function of the input float32 [N, ..., C]; it keeps the results small.

    Returns:
      Path of the layer -> result of `reduce`; {} for a model without such Flax layers.
    """
    inputs: dict[str, Any] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, nn.BatchNorm):
            inputs["/".join(context.module.path)] = reduce(args[0].astype(jnp.float32))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, images)
    return inputs


@lru_cache(maxsize=16)
def norm_kernels(model: Model) -> dict[str, str]:
    """Find the batch-normalisation layers whose input depends on one convolution only: path -> path of its kernel.

    Operations between the two that involve no other layer (pooling, an activation) are allowed. A convolution whose
    output is also used elsewhere (in a sum, a concatenation, or besides the normalisation) is omitted.
    """

    def mark(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or not isinstance(context.module, nn.Conv | nn.Dense | nn.BatchNorm):
            return call(*args, **kwargs)
        name = "/".join(context.module.path)
        kind = "norm" if isinstance(context.module, nn.BatchNorm) else "conv"
        kind = "dense" if isinstance(context.module, nn.Dense) else kind
        output = call(checkpoint_name(args[0], f"{_INPUT}{kind} {name}"), *args[1:], **kwargs)
        return checkpoint_name(output, f"{_OUTPUT}{kind} {name}")

    like = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    with nn.intercept_methods(mark):
        jaxpr = jax.make_jaxpr(lambda variables, images: model.apply(variables, images)[0])(like, images).jaxpr
    sources_of = _sources(jaxpr)
    uses = Counter(source for sources in sources_of.values() for source in sources)
    kernels = {}
    for layer, sources in sources_of.items():
        kind, _, name = layer.partition(" ")
        if kind == "norm" and len(sources) == 1:
            source_kind, _, source = next(iter(sources)).partition(" ")
            if source_kind == "conv" and uses[f"conv {source}"] == 1:
                kernels[name] = f"{source}/kernel"
    return kernels


def _sources(jaxpr: Any) -> dict[str, frozenset[str]]:
    """Return the layers whose outputs each marked layer depends on directly, all as "kind path"."""
    of_variable: dict[Any, frozenset[str]] = {}
    sources: dict[str, frozenset[str]] = {}
    for equation in jaxpr.eqns:
        union = frozenset().union(
            *(of_variable.get(v, frozenset()) for v in equation.invars if not isinstance(v, Literal))
        )
        name = str(equation.params.get("name", "")) if equation.primitive.name == "name" else ""
        if name.startswith(_INPUT):
            sources[name.removeprefix(_INPUT)] = union
        elif name.startswith(_OUTPUT):
            union = frozenset({name.removeprefix(_OUTPUT)})
        for out in equation.outvars:
            of_variable[out] = union
    return sources
