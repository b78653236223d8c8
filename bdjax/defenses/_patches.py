"""The smallest patch that sends images to a class: a mask and a pattern for each of several goals at once.

Images become (1 − m) x + m p, with m in [0, 1] for each pixel and p in [0, 1] for each pixel and channel (Wang et al.,
"Neural Cleanse", IEEE S&P 2019). Both minimise the hinge loss of :mod:`bdjax.defenses._smallest` plus a cost of the
mask's area. The cost grows while the patch succeeds and falls while it does not; the smallest successful mask is
returned.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import batch_of, images_per_goal
from bdjax.defenses._pool import draw_batches
from bdjax.defenses._smallest import hinge_loss, other_class_weights
from bdjax.engine import parallel, run_epoch
from bdjax.engine.optimizer import take_step
from bdjax.types import Key, Model, Variables, to_float

STEPS = 80
"""Steps of a search without a given start."""
BATCH = 24
"""Images per step, the same for all goals; with more than ten goals fewer."""
_RATE, _COST = 0.2, 0.1
_SUCCESS = 0.8  # success rate from which a patch is kept
_ADAM = optax.scale_by_adam(0.5, 0.9)


class Patches(NamedTuple):
    """One patch for each of P goals."""

    goals: np.ndarray
    """int32 [P], the target class of each patch, or `_smallest.ANY`; a class may occur several times."""
    masks: jax.Array
    """float32 [P, H, W, 1] in [0, 1]; zero where no patch succeeded."""
    patterns: jax.Array
    """float32 [P, H, W, C] in [0, 1]."""
    areas: np.ndarray
    """float32 [P], sums of the masks; H W where no patch succeeded."""


def search(
    model: Model,
    variables: Variables,
    images: Any,
    labels: Any,
    goals: np.ndarray,
    steps: int,
    key: Key,
    start: Patches | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
    batch_size: int = BATCH,
) -> Patches:
    """Search the smallest patch for each goal, from scratch or from given patches.

    Args:
      model: the classifier.
      variables: its variables; evaluation mode.
      images: stored [n, H, W, C].
      labels: int32 [n]. Images of a goal's own class do not count for that goal.
      goals: int32 [P]. Where a goal occurs several times, all but its first patch start at a random pattern.
      steps: number of steps.
      key: draws batches and patterns.
      start: initial patches, or None. Where no patch succeeds, the initial one is returned.
      tick: called with (steps done, steps).
      batch_size: images per step, the same for all goals; with more than ten goals fewer
        (:func:`bdjax.defenses._batch.images_per_goal`).

    Returns:
      Patches with these goals.
    """
    latent = _to_latent(start) if start else _initial_latent(model, goals, jax.random.fold_in(key, 1))
    goal_count = len(goals)
    best = {"mask": jnp.zeros((goal_count, *model.shape[:2], 1)), "pattern": jnp.full((goal_count, *model.shape), 0.5)}
    if start:
        best = {"mask": jnp.copy(start.masks), "pattern": jnp.copy(start.patterns)}  # the epoch gives its state away
    state = {
        "moved": latent, "opt": _ADAM.init(latent), "cost": jnp.full(goal_count, _COST), "rate": jnp.zeros(goal_count),
        "smallest": jnp.full(goal_count, jnp.inf), "best": best,
    }  # fmt: skip
    constants = {
        "images": jnp.asarray(images), "labels": jnp.asarray(labels), "goals": jnp.asarray(goals),
        "variables": dict(variables),
    }  # fmt: skip
    size = batch_of(images_per_goal(batch_size, goal_count), len(labels))
    batch_indices = jnp.asarray(draw_batches(key, len(labels), size, steps))
    state = run_epoch(_step(model), state, {"index": batch_indices}, {}, constants, tick=tick)[0]
    areas = np.minimum(np.asarray(state["smallest"]), np.prod(model.shape[:2])).astype(np.float32)
    return Patches(goals, state["best"]["mask"], state["best"]["pattern"], areas)


def _initial_latent(model: Model, goals: np.ndarray, key: Key) -> dict[str, jax.Array]:
    """Initial masks and patterns before the logistic function: zero (a value of one half), or a random pattern."""
    is_repeated = np.array([goal in goals[:position] for position, goal in enumerate(goals)])
    noise = jax.random.normal(key, (len(goals), *model.shape))
    return {
        "mask": jnp.zeros((len(goals), *model.shape[:2], 1)),
        "pattern": jnp.where(jnp.asarray(is_repeated)[:, None, None, None], noise, 0.0),
    }


def _to_latent(patches: Patches) -> dict[str, jax.Array]:
    """Return given patches as arguments of the logistic function, clipped away from its flat ends."""
    return {
        "mask": jax.scipy.special.logit(jnp.clip(patches.masks, 0.05, 0.95)),
        "pattern": jax.scipy.special.logit(jnp.clip(patches.patterns, 0.05, 0.95)),
    }


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """Return one step of all masks and patterns, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]
        goals = constants["goals"]

        def objective(latent: Any) -> tuple[jax.Array, jax.Array]:
            mask, pattern = jax.nn.sigmoid(latent["mask"])[:, None], jax.nn.sigmoid(latent["pattern"])[:, None]
            stamped = (1 - mask) * images[None] + mask * pattern
            value, hits = hinge_loss(model, constants["variables"], stamped, labels, goals)
            area = (state["cost"] * mask.sum((1, 2, 3, 4))).sum() / parallel.size(axis)
            return value + area, hits

        counted_images = other_class_weights(labels, goals).sum(1)
        (_, hits), gradient = jax.value_and_grad(objective, has_aux=True)(state["moved"])
        hits, gradient, counted_images = parallel.total((hits, gradient, counted_images), axis)
        rate = 0.7 * state["rate"] + 0.3 * hits / jnp.maximum(counted_images, 1)
        mask = jax.nn.sigmoid(state["moved"]["mask"])
        size = mask.sum((1, 2, 3))
        improved = (rate >= _SUCCESS) & (size < state["smallest"])
        current = {"mask": mask, "pattern": jax.nn.sigmoid(state["moved"]["pattern"])}
        best = jax.tree.map(lambda new, old: jnp.where(improved[:, None, None, None], new, old), current, state["best"])
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _ADAM.update(gradient, state["opt"])
        latent = take_step(state["moved"], update, _RATE)
        cost = state["cost"] * jnp.where(rate >= _SUCCESS, 1.1, 1 / 1.1**1.5)
        smallest = jnp.where(improved, size, state["smallest"])
        return {"moved": latent, "opt": opt, "cost": cost, "rate": rate, "best": best, "smallest": smallest}, {}

    return step
