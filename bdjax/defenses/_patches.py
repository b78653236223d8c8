"""The smallest patch that sends images to a class: a mask and a pattern for each of several goals at once.

Images become (1 − m) x + m p, with m in [0, 1] for each pixel and p in [0, 1] for each pixel and channel (Wang et al.,
"Neural Cleanse", IEEE S&P 2019). Both follow the hinge loss of :mod:`bdjax.defenses._smallest` plus a cost of the
mask's area, which grows while the patch works and falls while it does not; the smallest mask that worked is kept.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import batches
from bdjax.defenses._smallest import counted, hinge
from bdjax.engine import parallel, run_epoch
from bdjax.types import Key, Model, Variables, to_float

STEPS = 80
"""Of a search from nothing."""
_BATCH, _RATE, _COST = 24, 0.2, 0.1
_WORKS = 0.8  # success rate from which a patch is kept
_ADAM = optax.scale_by_adam(0.5, 0.9)


class Patches(NamedTuple):
    """One patch for each of P goals."""

    goals: np.ndarray
    """int32 [P], the class that each leads to, or `_smallest.ANY`; a class may occur several times."""
    masks: jax.Array
    """float32 [P, H, W, 1] in [0, 1]; zero where no patch worked."""
    patterns: jax.Array
    """float32 [P, H, W, C] in [0, 1]."""
    areas: np.ndarray
    """float32 [P], sums of the masks; H W where no patch worked."""


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
) -> Patches:
    """Find patches, or find them anew from others on.

    Args:
      images: stored [n, H, W, C]; labels: int32 [n]; images of a goal's own class do not count for it.
      goals: int32 [P]; of those that occur several times all but the first begin at a random pattern.
      steps: how many; key: draws batches and patterns.
      start: where to begin; where no patch works, its own is returned.

    Returns: patches of these goals.
    """
    moved = _unbounded(start) if start else _nothing(model, goals, jax.random.fold_in(key, 1))
    number = len(goals)
    best = {"mask": jnp.zeros((number, *model.shape[:2], 1)), "pattern": jnp.full((number, *model.shape), 0.5)}
    if start:
        best = {"mask": jnp.copy(start.masks), "pattern": jnp.copy(start.patterns)}  # the epoch gives its state away
    state = {
        "moved": moved, "opt": _ADAM.init(moved), "cost": jnp.full(number, _COST), "rate": jnp.zeros(number),
        "smallest": jnp.full(number, jnp.inf), "best": best,
    }  # fmt: skip
    shared = {
        "images": jnp.asarray(images), "labels": jnp.asarray(labels), "goals": jnp.asarray(goals),
        "variables": dict(variables),
    }  # fmt: skip
    index = jnp.asarray(batches(key, len(labels), batch_of(_BATCH, len(labels)), steps))
    state = run_epoch(_step(model), state, {"index": index}, {}, shared, tick=tick)[0]
    areas = np.minimum(np.asarray(state["smallest"]), np.prod(model.shape[:2])).astype(np.float32)
    return Patches(goals, state["best"]["mask"], state["best"]["pattern"], areas)


def _nothing(model: Model, goals: np.ndarray, key: Key) -> dict[str, jax.Array]:
    """Half of everything, as arguments of the logistic function."""
    again = np.array([goal in goals[:place] for place, goal in enumerate(goals)])
    noise = jax.random.normal(key, (len(goals), *model.shape))
    return {
        "mask": jnp.zeros((len(goals), *model.shape[:2], 1)),
        "pattern": jnp.where(jnp.asarray(again)[:, None, None, None], noise, 0.0),
    }


def _unbounded(patches: Patches) -> dict[str, jax.Array]:
    """As arguments of the logistic function, kept from where it is flat."""
    return {
        "mask": jax.scipy.special.logit(jnp.clip(patches.masks, 0.05, 0.95)),
        "pattern": jax.scipy.special.logit(jnp.clip(patches.patterns, 0.05, 0.95)),
    }


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """One step of all masks and patterns, in the engine's form."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        goals = shared["goals"]

        def loss(moved: Any) -> tuple[jax.Array, jax.Array]:
            mask, pattern = jax.nn.sigmoid(moved["mask"])[:, None], jax.nn.sigmoid(moved["pattern"])[:, None]
            stamped = (1 - mask) * images[None] + mask * pattern
            value, hits = hinge(model, shared["variables"], stamped, labels, goals)
            area = (state["cost"] * mask.sum((1, 2, 3, 4))).sum() / parallel.size(axis)
            return value + area, hits

        number = counted(labels, goals).sum(1)
        (_, hits), gradient = jax.value_and_grad(loss, has_aux=True)(state["moved"])
        hits, gradient, number = parallel.total((hits, gradient, number), axis)
        rate = 0.7 * state["rate"] + 0.3 * hits / jnp.maximum(number, 1)
        mask = jax.nn.sigmoid(state["moved"]["mask"])
        size = mask.sum((1, 2, 3))
        better = (rate >= _WORKS) & (size < state["smallest"])
        here = {"mask": mask, "pattern": jax.nn.sigmoid(state["moved"]["pattern"])}
        best = jax.tree.map(lambda new, old: jnp.where(better[:, None, None, None], new, old), here, state["best"])
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _ADAM.update(gradient, state["opt"])
        moved = jax.tree.map(lambda p, u: p - _RATE * u, state["moved"], update)
        cost = state["cost"] * jnp.where(rate >= _WORKS, 1.1, 1 / 1.1**1.5)
        smallest = jnp.where(better, size, state["smallest"])
        return {"moved": moved, "opt": opt, "cost": cost, "rate": rate, "best": best, "smallest": smallest}, {}

    return step
