"""The training step: gather, let the attacker at the batch, augment, take one gradient, update."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.engine import augment, parallel
from bdjax.engine.optimizer import direction
from bdjax.types import Batch, Key, Model, SampleInfo, TrainingHook, to_float


def draw(key: Key, total: int, steps: int, batch: int, shares: tuple[float, ...] | None = None) -> dict[str, jax.Array]:
    """Which image stands where in this epoch, and the keys of each place: all [steps, batch].

    `shares` (of a :class:`TrainingHook`) adds each place's role and its key for the attacker.
    """
    drawn = _drawer(total, steps, batch)(key)
    if shares is not None:
        drawn["role"] = jnp.asarray(roles(shares, steps * batch).reshape(steps, batch))
        drawn["key"] = jax.random.split(jax.random.fold_in(key, 2), (steps, batch))
    return drawn


@lru_cache(maxsize=8)
def _drawer(total: int, steps: int, batch: int) -> Callable:
    def run(key: Key) -> dict[str, jax.Array]:
        order = jax.random.permutation(jax.random.fold_in(key, 0), total)[: steps * batch]
        keys = jax.random.split(jax.random.fold_in(key, 1), (2, steps, batch))
        return {"index": order.reshape(steps, batch), "augment": keys[0], "dropout": keys[1]}

    return jax.jit(run)


def roles(shares: tuple[float, ...], places: int) -> np.ndarray:
    """int8 [places]: exactly int(share * places) places of each role, spread so evenly that any run of B places holds
    at most :func:`capacity` of one."""
    found = np.zeros(places, np.int8)
    for role, share in enumerate(shares, 1):
        free = np.flatnonzero(found == 0)
        wanted = min(int(share * places + 1e-9), len(free))  # 0.1 * 10 is one, whatever floats say
        steps = np.arange(len(free) + 1) * wanted // max(len(free), 1)
        found[free[steps[1:] > steps[:-1]]] = role
    return found


def capacity(share: float, batch: int) -> int:
    """How many of `batch` neighbouring places can have one role (see :func:`roles`)."""
    return min(batch, math.ceil(share * batch) + 2)


@lru_cache(maxsize=64)
def training_step(model: Model, optimizer: Any, policy: str, hook: TrainingHook | None = None) -> Callable:
    """The step in the engine's form; one object per set of arguments, whatever the other hyper-parameters."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        attacker = state.get("attacker", {})
        own_images, own_labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]

        def loss(trained: Any) -> tuple[jax.Array, Any]:
            params, learned = trained
            given, info = (
                {**attacker, "params": learned},
                SampleInfo(split["index"], split.get("role"), split.get("key"), axis),
            )
            batch = Batch(own_images, own_labels)
            if hook and hook.transform:
                batch = hook.transform(hook.config, given, own_images, own_labels, info)
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, features, stats = model.apply(
                variables, distort(batch.images, split["augment"]), True, split["dropout"], axis
            )
            value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean() + batch.loss
            if hook and hook.penalty:
                value = value + hook.penalty(hook.config, given, features, batch.labels, info)
            hits = (logits.argmax(-1) == batch.labels).mean()
            return value, (hits, stats, batch.state)

        trained = state["params"], attacker.get("params", {})
        (value, (hits, stats, carried)), (gradient, learned) = jax.value_and_grad(loss, has_aux=True)(trained)
        metrics = {"loss": value, "accuracy": hits}
        gradient, learned, metrics = parallel.average((gradient, learned, metrics), axis)
        gradient = jax.tree.map(lambda g, p: g + shared["weight_decay"] * p, gradient, state["params"])
        update, opt_state = direction(optimizer, shared["momentum"]).update(gradient, state["opt_state"])
        params = jax.tree.map(lambda p, u: p - whole["rate"] * u, state["params"], update)
        after = {"params": params, "batch_stats": stats, "opt_state": opt_state}
        if hook:
            after["attacker"] = _next(hook, attacker, learned, carried)
        return after, metrics

    return step


def _next(hook: TrainingHook, attacker: Any, gradient: Any, carried: Any) -> Any:
    after = {**attacker}
    if carried is not None:
        after["state"] = carried
    if hook.optimizer:
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            update, after["opt"] = hook.optimizer(hook.config).update(gradient, attacker["opt"], attacker["params"])
            after["params"] = optax.apply_updates(attacker["params"], update)
    return after
