"""Training on the defender's images, epoch by epoch, with a say in the loss and in where the parameters may be.

What :func:`bdjax.defenses._tuning.tune` cannot do: a term of the loss that depends on the parameters, a projection of
them after every step, ascent in place of descent, and a stop by what an epoch gave.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import augment
from bdjax.defenses._batch import batch_of
from bdjax.engine import FitConfig, parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, learning_rates
from bdjax.engine.step import draw
from bdjax.types import Key, Model, Variables, Victim, Watch, to_float

Term = Callable[[Any, Any], jax.Array]
"""`term(params, given) -> scalar`, added to the loss: a function of a module."""
Projection = Callable[[Any, Any], Any]
"""`projection(params, given) -> params`, after every step: a function of a module."""


class Epoch(NamedTuple):
    """What an epoch gave; its variables are donated to the next one."""

    number: int
    """From 1."""
    variables: Variables
    """After it."""
    loss: float
    """Mean of its steps."""
    accuracy: float
    """On its batches, each before its step."""


def epochs(
    victim: Victim, images: Any, labels: np.ndarray, recipe: FitConfig, key: Key, watch: Watch, stage: str, *,
    sign: float = 1.0, rates: Callable[[int], float] | None = None, term: Term | None = None,
    projection: Projection | None = None, given: Any = None,
) -> Iterator[Epoch]:  # fmt: skip
    """Train the victim on by `recipe`, in training mode, and give what there is after each epoch.

    Args:
      images: stored [n, H, W, C]; labels: [n]. The batch is cut to what there is and what the devices divide.
      sign: what the cross-entropy is multiplied by; -1 ascends it.
      rates: `rates(epoch from 0)`, in place of the recipe's learning rate and schedule.
      term, projection: see above; given: pytree of arrays, their second argument.
      stage: what the steps are called; the watch is told of each, and shown nothing.
    Raises InputError for fewer images than devices, and for a loss that is not finite.
    """
    size = batch_of(recipe.batch_size, len(labels))
    steps = len(labels) // size
    schedule = learning_rates(recipe.schedule, recipe.learning_rate, recipe.epochs * steps)
    step = _step(victim.model, recipe.optimizer, recipe.augment, term, projection)
    state = jax.tree.map(jnp.array, {**victim.variables})  # a copy, for the step's state is donated
    state["opt"] = direction(recipe.optimizer, recipe.momentum).init(state["params"])
    shared = {
        "images": jnp.asarray(images),
        "labels": jnp.asarray(labels),
        "given": given,
        **{name: jnp.float32(getattr(recipe, name)) for name in ("momentum", "weight_decay")},
        "sign": jnp.float32(sign),
    }
    for epoch in range(recipe.epochs):
        begun = epoch * steps
        split = draw(jax.random.fold_in(key, epoch), len(labels), steps, size)
        rate = schedule[begun : begun + steps] if rates is None else np.full(steps, rates(epoch), np.float32)

        def tick(done: int, _: int, begun: int = begun) -> None:
            watch.tick(stage, begun + done, recipe.epochs * steps)

        state, metrics = run_epoch(step, state, split, {"rate": jnp.asarray(rate)}, shared, tick=tick)
        check_finite(metrics["loss"], rate, begun, f"{stage} loss", "defense.learning_rate")
        variables = {name: state[name] for name in ("params", "batch_stats")}
        yield Epoch(epoch + 1, variables, *(float(metrics[name].mean()) for name in ("loss", "accuracy")))


@lru_cache(maxsize=32)
def _step(model: Model, optimizer: Any, policy: str, term: Term | None, projection: Projection | None) -> Callable:
    """One step in the engine's form."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels = shared["labels"][split["index"]]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, _, stats = model.apply(variables, images, True, split["dropout"], axis)
            value = shared["sign"] * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            value = value + (term(params, shared["given"]) if term else 0)
            return value, (stats, (logits.argmax(-1) == labels).mean())

        (value, (stats, hits)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, {"loss": value, "accuracy": hits}), axis)
        gradient = jax.tree.map(lambda g, p: g + shared["weight_decay"] * p, gradient, state["params"])
        update, opt = direction(optimizer, shared["momentum"]).update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - whole["rate"] * u, state["params"], update)
        params = projection(params, shared["given"]) if projection else params
        return {"params": params, "batch_stats": stats, "opt": opt}, metrics

    return step
