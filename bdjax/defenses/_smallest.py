"""The smallest universal perturbation that sends images to a class, for many classes at once.

For a class c, one perturbation δ is added to all images of other classes. Its direction follows the gradient of the
hinge loss max(0, max_{k≠c} f_k(x + δ) − f_c(x + δ) + margin) with momentum; its L2 norm is kept at a radius that
shrinks while δ works and grows slowly while it does not, so that direction and radius are optimised separately, as in
DDN (Rony et al., CVPR 2019, arXiv:1811.09600). The radius that remains says how far class c is from all images: a
backdoor's target is much nearer than the others (Wang et al., IEEE S&P 2019, measure the same with masks).

A goal of `ANY` asks that images of all classes leave their own, for wherever: what an all-to-all backdoor does.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import batches
from bdjax.engine import parallel, run_epoch
from bdjax.types import Key, Model, Variables, to_float

ANY = -1
"""The goal of a perturbation that sends images to any class but their own."""
MARGIN = 2.0
"""Logits by which the class is to lead."""
_MOMENTUM, _AVERAGE = 0.8, 0.7  # of the direction; of the success rate from step to step
_WORKS, _FAILS = 0.85, 0.6  # success rates above which the radius shrinks and below which it grows
_SHRINK, _GROW = 0.9, 1.03
_TOGETHER = 1024  # images in one program, all classes together


class Perturbations(NamedTuple):
    """One perturbation for each of P goals."""

    goals: np.ndarray
    """int32 [P], the class that each leads to, or `ANY`; a class may occur several times."""
    deltas: jax.Array
    """float32 [P, H, W, C], added to images in [0, 1], which are then clipped."""
    radii: np.ndarray
    """float32 [P], L2 bound of each; the largest one where the perturbation does not work."""


def largest(model: Model, share: float) -> float:
    """L2 norm of a perturbation of `share` in every pixel and channel."""
    return share * float(np.sqrt(np.prod(model.shape)))


def search(
    model: Model,
    variables: Variables,
    images: Any,
    labels: Any,
    start: Perturbations,
    steps: int,
    batch_size: int,
    cap: float,
    key: Key,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Perturbations:
    """Improve the perturbations in `start`.

    Args:
      images: stored [n, H, W, C]; labels: int32 [n]; images of a goal's own class do not count for it.
      start: where to begin, for instance :func:`none`; its radii are where the radii begin.
      steps: how many; batch_size: images a step, the same for all goals; cap: largest L2 radius.
      key: draws the batches.

    Returns: perturbations of the same goals; a goal reached by at most half of the images has the radius `cap`.
    """
    size = batch_of(batch_size, len(labels))
    index = batches(key, len(labels), size, steps)
    shared = {
        "images": jnp.asarray(images), "labels": jnp.asarray(labels), "variables": dict(variables),
        "cap": jnp.float32(cap),
    }  # fmt: skip
    number = len(start.goals)
    group = min(number, max(1, _TOGETHER // size))
    deltas, radii = [], []
    for begin in range(0, number, group):
        # the last group is filled up, so that all groups are one program
        which = np.minimum(np.arange(begin, begin + group), number - 1)
        state = {
            "delta": start.deltas[which],
            "velocity": jnp.zeros((group, *model.shape)),
            "radius": jnp.asarray(start.radii[which]),
            "rate": jnp.zeros(group),
        }
        shared["goals"] = jnp.asarray(start.goals[which])
        state = run_epoch(_step(model), state, {"index": index}, {}, shared, tick=tick)[0]
        real = min(group, number - begin)
        deltas.append(np.asarray(state["delta"])[:real])
        radii.append(np.where(np.asarray(state["rate"]) > 0.5, np.asarray(state["radius"]), cap)[:real])
    return Perturbations(start.goals, jnp.asarray(np.concatenate(deltas)), np.concatenate(radii).astype(np.float32))


def none(model: Model, cap: float) -> Perturbations:
    """Where a search over all classes begins: no perturbation, the largest radius."""
    goals = np.arange(model.classes, dtype=np.int32)
    return Perturbations(goals, jnp.zeros((model.classes, *model.shape)), np.full(model.classes, cap, np.float32))


def norms(deltas: jax.Array) -> jax.Array:
    """L2 norm of each of [P, H, W, C], as [P, 1, 1, 1]; at least 1e-9."""
    return jnp.maximum(jnp.sqrt((deltas**2).sum((1, 2, 3), keepdims=True)), 1e-9)


def counted(labels: jax.Array, goals: jax.Array) -> jax.Array:
    """float32 [P, B]: 1 for an image of another class than the goal, 0 for one of its own."""
    return (labels[None] != goals[:, None]).astype(jnp.float32)


def hinge(
    model: Model, variables: Variables, stamped: jax.Array, labels: jax.Array, goals: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of the search, and how many images each perturbation sends to its goal.

    Args: stamped: float32 [P, B, H, W, C], the images with each trigger on; labels: int32 [B]; goals: int32 [P].
    Returns: the sum over all images that count, a scalar; hits, float32 [P].
    """
    logits = model.logits(variables, stamped.reshape(-1, *model.shape)).reshape(*stamped.shape[:2], -1)
    own = jax.nn.one_hot(labels, model.classes, dtype=bool)[None]
    is_goal = jnp.where((goals == ANY)[:, None, None], ~own, jax.nn.one_hot(goals, model.classes, dtype=bool)[:, None])
    wanted = jnp.where(is_goal, logits, -jnp.inf).max(-1)
    others = jnp.where(is_goal, -jnp.inf, logits).max(-1)
    weight = counted(labels, goals)
    return (jnp.maximum(0, others - wanted + MARGIN) * weight).sum(), jnp.where(wanted > others, weight, 0).sum(1)


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """One step of all perturbations, in the engine's form."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        goals = shared["goals"]

        def loss(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
            return hinge(model, shared["variables"], jnp.clip(images[None] + delta[:, None], 0, 1), labels, goals)

        number = counted(labels, goals).sum(1)
        (_, hits), gradient = jax.value_and_grad(loss, has_aux=True)(state["delta"])
        hits, gradient, number = parallel.total((hits, gradient, number), axis)
        rate = _AVERAGE * state["rate"] + (1 - _AVERAGE) * hits / jnp.maximum(number, 1)
        change = jnp.where(rate > _WORKS, _SHRINK, jnp.where(rate < _FAILS, _GROW, 1.0))
        radius = jnp.minimum(state["radius"] * change, shared["cap"])
        velocity = _MOMENTUM * state["velocity"] + gradient / norms(gradient)
        length = radius[:, None, None, None]
        delta = state["delta"] - length / 5 * velocity / norms(velocity)
        delta = delta * jnp.minimum(1, length / norms(delta))
        return {"delta": delta, "velocity": velocity, "radius": radius, "rate": rate}, {}

    return step
