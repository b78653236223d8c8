"""Training step: gather the batch, apply the attacker's hook, augment, compute the gradient, update."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.engine import augment, parallel
from bdjax.engine.optimizer import direction, take_step
from bdjax.types import Batch, Key, Model, SampleInfo, TrainingHook, to_float


def draw(key: Key, total: int, steps: int, batch: int, shares: tuple[float, ...] | None = None) -> dict[str, jax.Array]:
    """Draw the order of the images in an epoch and the random keys of each position.

    Args:
      key: random key of the epoch.
      total: number of images.
      steps: number of batches.
      batch: images per batch.
      shares: fractions of the images with role 1, 2, ... (see :class:`bdjax.types.TrainingHook`); None: no roles.

    Returns:
      Arrays [steps, batch]: "index" (int32 indices of the images), "augment" and "dropout" (keys), and, with `shares`,
      "role" (int8) and "key" (keys for the attacker).
    """
    arrays = _draw_jit(total, steps, batch)(key)
    if shares is not None:
        arrays["role"] = jnp.asarray(roles(shares, steps * batch).reshape(steps, batch))
        arrays["key"] = jax.random.split(jax.random.fold_in(key, 2), (steps, batch))
    return arrays


@lru_cache(maxsize=8)
def _draw_jit(total: int, steps: int, batch: int) -> Callable:
    def run(key: Key) -> dict[str, jax.Array]:
        order = jax.random.permutation(jax.random.fold_in(key, 0), total)[: steps * batch]
        keys = jax.random.split(jax.random.fold_in(key, 1), (2, steps, batch))
        return {"index": order.reshape(steps, batch), "augment": keys[0], "dropout": keys[1]}

    return jax.jit(run)


def roles(shares: tuple[float, ...], places: int) -> np.ndarray:
    """Assign roles to the positions of an epoch, spread evenly.

    Each role gets exactly int(share * places) positions, and any B consecutive positions contain at most
    :func:`capacity` of one role.

    Args:
      shares: fractions of the positions with role 1, 2, ...
      places: number of positions.

    Returns:
      int8 [places]; 0 where a position has no role.
    """
    assigned = np.zeros(places, np.int8)
    for role, share in enumerate(shares, 1):
        free = np.flatnonzero(assigned == 0)
        count = min(int(share * places + 1e-9), len(free))  # 1e-9 guards against rounding: 0.1 * 10 is 1
        steps = np.arange(len(free) + 1) * count // max(len(free), 1)
        assigned[free[steps[1:] > steps[:-1]]] = role
    return assigned


def capacity(share: float, batch: int) -> int:
    """Return the largest number of `batch` consecutive positions that can have one role (see :func:`roles`)."""
    return min(batch, math.ceil(share * batch) + 2)


@lru_cache(maxsize=64)
def training_step(model: Model, optimizer: Any, policy: str, hook: TrainingHook | None = None) -> Callable:
    """Return the training step of a model, the same object for the same arguments.

    Args:
      model: the classifier.
      optimizer: name of the optimiser (see :func:`bdjax.engine.optimizer.direction`).
      policy: name of the augmentation (see :func:`bdjax.engine.augment.policy`).
      hook: an attacker's interventions, or None.

    Returns:
      A step in the form that :mod:`bdjax.engine.parallel` describes. `constants` holds "images", "labels", "momentum"
      and "weight_decay"; `per_step` the learning rate "rate"; `batch` the arrays of :func:`draw`.
    """
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        attacker = state.get("attacker", {})
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]

        def loss(trained: Any) -> tuple[jax.Array, Any]:
            params, attacker_params = trained
            arrays, info = (
                {**attacker, "params": attacker_params},
                SampleInfo(batch["index"], batch.get("role"), batch.get("key"), axis),
            )
            samples = Batch(images, labels)
            if hook and hook.transform:
                samples = hook.transform(hook.config, arrays, images, labels, info)
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, features, stats = model.apply(
                variables, augmented(samples.images, batch["augment"]), True, batch["dropout"], axis
            )
            value = optax.softmax_cross_entropy_with_integer_labels(logits, samples.labels).mean() + samples.loss
            if hook and hook.penalty:
                value = value + hook.penalty(hook.config, arrays, features, samples.labels, info)
            hits = (logits.argmax(-1) == samples.labels).mean()
            return value, (hits, stats, samples.state)

        trained = state["params"], attacker.get("params", {})
        (value, (hits, stats, new_state)), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        metrics = {"loss": value, "accuracy": hits}
        (gradient, attacker_gradient), metrics = parallel.average((gradients, metrics), axis)
        gradient = jax.tree.map(lambda g, p: g + constants["weight_decay"] * p, gradient, state["params"])
        update, opt_state = direction(optimizer, constants["momentum"]).update(gradient, state["opt_state"])
        params = take_step(state["params"], update, per_step["rate"])
        after = {"params": params, "batch_stats": stats, "opt_state": opt_state}
        if hook:
            after["attacker"] = _update_attacker(hook, attacker, attacker_gradient, new_state)
        return after, metrics

    return step


def _update_attacker(hook: TrainingHook, attacker: Any, gradient: Any, new_state: Any) -> Any:
    """Return the attacker's arrays after a step: the new state, and parameters updated by the hook's optimiser."""
    after = {**attacker}
    if new_state is not None:
        after["state"] = new_state
    if hook.optimizer:
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            update, after["opt"] = hook.optimizer(hook.config).update(gradient, attacker["opt"], attacker["params"])
            after["params"] = optax.apply_updates(attacker["params"], update)
    return after
