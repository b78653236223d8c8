"""The bilevel problem of I-BAU: the inner objective and the outer loss of one step (:mod:`bdjax.defenses.ibau`)."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdjax import models
from bdjax.defenses._batch import device_part
from bdjax.engine import parallel
from bdjax.engine.optimizer import Name, direction, take_step
from bdjax.hypergrad import hypergradient, solver
from bdjax.types import Model, to_float


class Static(NamedTuple):
    """The Config fields that the compiled program depends on."""

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
    """Return the functions of one batch: its cross-entropy with δ added, and the inner objective g."""

    def entropy(delta: jax.Array, params: Any, constants: Any, batch: Any, axis: str | None, labels: Any = None):
        """Return this device's share of CE(f(x + δ), y), and the logits; the weights of a batch sum to one."""
        images = to_float(constants["images"][batch["index"]]) + delta
        images = jnp.clip(images, 0, 1) if static.clamp else images
        variables = {"params": params, "batch_stats": constants["batch_stats"]}
        logits = model.apply(variables, images, static.batch_norm == "batch", None, axis)[0]
        labels = constants["labels"][batch["index"]] if labels is None else labels
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * batch["weight"]).sum(), logits

    def g(delta: jax.Array, params: Any, constants: Any, batch: Any, axis: str | None, labels: Any = None) -> jax.Array:
        """Return this device's share of the inner objective −CE + penalty ‖δ‖²."""
        penalty = constants["hyper"]["penalty"] * (delta**2).sum() / parallel.size(axis)
        return penalty - entropy(delta, params, constants, batch, axis, labels)[0]

    return entropy, g


def bilevel(model: Model, static: Static, constants: Any, batch: Any, axis: str | None) -> tuple[Callable, Callable]:
    """Return the inner objective g(δ, θ) and the outer loss E(δ, θ) of one θ step.

    Args:
      model: the classifier.
      static: the fields that the program depends on.
      constants: images, labels, BatchNorm statistics, hyper-parameters and the first batch.
      batch: "index", "weight" and "patched", each [B].
      axis: name of the mapped axis, or None.

    Returns:
      (g, E), both functions of (δ, θ) with scalar values, each this device's share.
    """
    entropy = losses(model, static)[0]
    if static.products != "float32":
        model = models.as_dtype(model, jnp.dtype(static.products))
    g = losses(model, static)[1]
    inner_batch = batch
    if static.hessian_data == "first_batch":
        inner_batch = jax.tree.map(partial(device_part, axis=axis), constants["first"])

    def inner(delta: jax.Array, params: Any) -> jax.Array:
        return g(delta, params, constants, inner_batch, axis)

    def outer(delta: jax.Array, params: Any) -> jax.Array:
        perturbation = jnp.where(batch["patched"][:, None, None, None], delta, jnp.zeros_like(delta))
        return entropy(perturbation, params, constants, batch, axis)[0]

    return inner, outer


@lru_cache(maxsize=32)
def bilevel_steps(model: Model, static: Static) -> tuple[Callable, Callable]:
    """Return the step of δ and the step of θ, in the engine's form (see :mod:`bdjax.engine.parallel`)."""
    entropy, g = losses(model, static)

    def inner(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        """Accumulate the gradient of one batch, and move δ at the last batch of an ascent step."""
        labels, params = None, constants["params"]
        if static.inner_labels == "predicted":
            labels = entropy(jnp.zeros_like(state["delta"]), params, constants, batch, axis)[1].argmax(-1)
        loss, gradient = jax.value_and_grad(g)(state["delta"], params, constants, batch, axis, labels)
        loss, gradient = parallel.total((loss, gradient), axis)
        accumulated = state["gathered"] + gradient * per_step["share"]
        update, opt = direction(static.inner_optimizer).update(accumulated, state["opt"])
        delta = state["delta"] - constants["hyper"]["inner_lr"] * update
        stepped = {"delta": delta, "opt": opt, "gathered": jnp.zeros_like(accumulated)}
        waiting = {**state, "gathered": accumulated}
        return jax.tree.map(partial(jnp.where, per_step["steps"]), stepped, waiting), {"g": loss}

    def outer(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        """Move θ along the hypergradient."""
        hyper = constants["hyper"]
        loss, gradient, _ = hypergradient(
            *bilevel(model, static, constants, batch, axis),
            constants["delta"],
            state["params"],
            solver(static.solver, static.solver_iterations, hyper["solver_step"], hyper["ridge"]),
            partial(parallel.total, axis=axis),
        )
        update, opt = direction(static.outer_optimizer).update(gradient, state["opt"])
        params = take_step(state["params"], update, hyper["outer_lr"])
        return {"params": params, "opt": opt}, {"loss": loss, "norm": optax.tree.norm(gradient)}

    return inner, outer
