"""I-BAU's bilevel problem: the inner objective and the outer loss of one step (:mod:`bdjax.defenses.ibau`)."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdjax import models
from bdjax.defenses._batch import own_part
from bdjax.engine import parallel
from bdjax.engine.optimizer import Name
from bdjax.types import Model, to_float


class Static(NamedTuple):
    """What of a Config changes the compiled program."""

    inner_labels: str
    inner_optimizer: Name
    clamp: bool
    hessian_data: str
    outer_optimizer: Name
    batch_norm: str
    solver: str
    solver_iterations: int
    products: str


@lru_cache(maxsize=32)
def losses(model: Model, static: Static) -> tuple[Callable, Callable]:
    """The cross-entropy of one batch with δ on, and the inner objective g."""

    def entropy(delta: jax.Array, params: Any, shared: Any, split: Any, axis: str | None, labels: Any = None):
        """This device's share of CE(f(x + δ), y); the weights of a batch sum to one over all devices."""
        images = to_float(shared["images"][split["index"]]) + delta
        images = jnp.clip(images, 0, 1) if static.clamp else images
        variables = {"params": params, "batch_stats": shared["batch_stats"]}
        logits = model.apply(variables, images, static.batch_norm == "batch", None, axis)[0]
        labels = shared["labels"][split["index"]] if labels is None else labels
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * split["weight"]).sum(), logits

    def g(delta: jax.Array, params: Any, shared: Any, split: Any, axis: str | None, labels: Any = None) -> jax.Array:
        """This device's share of the inner objective −CE + penalty ‖δ‖²."""
        penalty = shared["hyper"]["penalty"] * (delta**2).sum() / parallel.size(axis)
        return penalty - entropy(delta, params, shared, split, axis, labels)[0]

    return entropy, g


def bilevel(model: Model, static: Static, shared: Any, split: Any, axis: str | None) -> tuple[Callable, Callable]:
    """g(δ, θ) and E(δ, θ) of one θ step."""
    entropy = losses(model, static)[0]
    if static.products != "float32":
        model = models.as_dtype(model, jnp.dtype(static.products))
    g = losses(model, static)[1]
    inner_split = split
    if static.hessian_data == "first_batch":
        inner_split = jax.tree.map(partial(own_part, axis=axis), shared["first"])

    def inner(delta: jax.Array, params: Any) -> jax.Array:
        return g(delta, params, shared, inner_split, axis)

    def outer(delta: jax.Array, params: Any) -> jax.Array:
        patch = jnp.where(split["patched"][:, None, None, None], delta, jnp.zeros_like(delta))
        return entropy(patch, params, shared, split, axis)[0]

    return inner, outer
