"""Batch normalisation seen from outside: what enters each layer, and which convolution it follows."""

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

_GIVES, _TAKES = "bdjax gives ", "bdjax takes "


def norm_inputs(model: Model, variables: Variables, images: Images, reduce: Callable) -> dict[str, Any]:
    """`reduce` of what enters each batch normalisation in evaluation mode, by the layer's path.

    Args: images: float32 [N, H, W, C]; reduce: of float32 [N, ..., C], so that no program has to return all of it.
    Returns: {} for a model without such layers, or one that is not made of Flax's.
    """
    found: dict[str, Any] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, nn.BatchNorm):
            found["/".join(context.module.path)] = reduce(args[0].astype(jnp.float32))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        model.apply(variables, images)
    return found


@lru_cache(maxsize=16)
def norm_kernels(model: Model) -> dict[str, str]:
    """Of each batch normalisation that a convolution's output alone enters: its path -> the path of that kernel.

    Between the two may stand what joins no other layer's output (pooling, an activation). A convolution whose output
    also goes elsewhere (to a sum, to a concatenation, past the normalisation) is left out with its layer.
    """

    def mark(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or not isinstance(context.module, nn.Conv | nn.Dense | nn.BatchNorm):
            return call(*args, **kwargs)
        name = "/".join(context.module.path)
        kind = "norm" if isinstance(context.module, nn.BatchNorm) else "conv"
        kind = "dense" if isinstance(context.module, nn.Dense) else kind
        given = call(checkpoint_name(args[0], f"{_TAKES}{kind} {name}"), *args[1:], **kwargs)
        return checkpoint_name(given, f"{_GIVES}{kind} {name}")

    like = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    with nn.intercept_methods(mark):
        jaxpr = jax.make_jaxpr(lambda variables, images: model.apply(variables, images)[0])(like, images).jaxpr
    takes = _sources(jaxpr)
    uses = Counter(source for sources in takes.values() for source in sources)
    found = {}
    for layer, sources in takes.items():
        kind, _, name = layer.partition(" ")
        if kind == "norm" and len(sources) == 1:
            made, _, maker = next(iter(sources)).partition(" ")
            if made == "conv" and uses[f"conv {maker}"] == 1:
                found[name] = f"{maker}/kernel"
    return found


def _sources(jaxpr: Any) -> dict[str, frozenset[str]]:
    """Which layers' outputs each marked layer takes, both as "kind path"."""
    of: dict[Any, frozenset[str]] = {}
    takes: dict[str, frozenset[str]] = {}
    for equation in jaxpr.eqns:
        mixed = frozenset().union(*(of.get(v, frozenset()) for v in equation.invars if not isinstance(v, Literal)))
        name = str(equation.params.get("name", "")) if equation.primitive.name == "name" else ""
        if name.startswith(_TAKES):
            takes[name.removeprefix(_TAKES)] = mixed
        elif name.startswith(_GIVES):
            mixed = frozenset({name.removeprefix(_GIVES)})
        for out in equation.outvars:
            of[out] = mixed
    return takes
