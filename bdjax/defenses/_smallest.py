"""The smallest universal perturbation that sends images to a class, for many classes at once.

For a class c, one perturbation δ is added to all images of other classes. Its direction follows the gradient of the
hinge loss max(0, max_{k≠c} f_k(x + δ) − f_c(x + δ) + margin) with momentum. Its L2 norm is kept at a radius that
shrinks while δ succeeds and grows slowly while it does not. Direction and radius are thus optimised separately, as in
DDN (J. Rony, L. G. Hafemann, L. S. Oliveira, I. Ben Ayed, R. Sabourin and E. Granger, "Decoupling Direction and Norm
for Efficient Gradient-Based L2 Adversarial Attacks and Defenses", CVPR 2019, arXiv:1811.09600). The final radius
measures the distance of class c from all images. The target of a backdoor is much nearer than the other classes (Neural
Cleanse, Wang et al., IEEE S&P 2019, measures the same with masks).

With the goal `ANY`, images of all classes are to leave their own class for an arbitrary other one, as under an
all-to-all backdoor.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import draw_batches
from bdjax.engine import parallel, run_epoch
from bdjax.types import Key, Model, Variables, to_float

ANY = -1
"""Goal of a perturbation that sends images to any class other than their own."""
MARGIN = 2.0
"""Margin of the hinge loss, in logits."""
_MOMENTUM, _AVERAGE = 0.8, 0.7  # of the direction; of the success rate from step to step
_SUCCESS, _FAILURE = 0.85, 0.6  # success rates above which the radius shrinks and below which it grows
_SHRINK, _GROW = 0.9, 1.03
_MAX_IMAGES = 1024  # images in one program, all classes together


class Perturbations(NamedTuple):
    """One perturbation for each of P goals."""

    goals: np.ndarray
    """int32 [P], the target class of each perturbation, or `ANY`; a class may occur several times."""
    deltas: jax.Array
    """float32 [P, H, W, C], added to images in [0, 1], which are then clipped."""
    radii: np.ndarray
    """float32 [P], L2 bound of each perturbation; the largest allowed radius where the perturbation does not
    succeed."""


def norm_limit(model: Model, share: float) -> float:
    """Return the L2 norm of a perturbation with the value `share` in every pixel and channel."""
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
    """Reduce the radii of perturbations while they keep sending images to their goals.

    Args:
      model: the classifier.
      variables: its variables; evaluation mode.
      images: stored [n, H, W, C].
      labels: int32 [n]. Images of a goal's own class do not count for that goal.
      start: initial perturbations and radii, for instance :func:`zero_perturbations`.
      steps: number of steps.
      batch_size: images per step, the same for all goals.
      cap: largest L2 radius.
      key: draws the batches.
      tick: called with (steps done, steps).

    Returns:
      Perturbations with the same goals; a goal that at most half of the images reach has the radius `cap`.
    """
    size = batch_of(batch_size, len(labels))
    batch_indices = draw_batches(key, len(labels), size, steps)
    constants = {
        "images": jnp.asarray(images), "labels": jnp.asarray(labels), "variables": dict(variables),
        "cap": jnp.float32(cap),
    }  # fmt: skip
    goal_count = len(start.goals)
    group_size = min(goal_count, max(1, _MAX_IMAGES // size))
    deltas, radii = [], []
    for first in range(0, goal_count, group_size):
        # the last group is filled up, so that all groups are one program
        members = np.minimum(np.arange(first, first + group_size), goal_count - 1)
        state = {
            "delta": start.deltas[members],
            "velocity": jnp.zeros((group_size, *model.shape)),
            "radius": jnp.asarray(start.radii[members]),
            "rate": jnp.zeros(group_size),
        }
        constants["goals"] = jnp.asarray(start.goals[members])
        state = run_epoch(_step(model), state, {"index": batch_indices}, {}, constants, tick=tick)[0]
        real_count = min(group_size, goal_count - first)
        deltas.append(np.asarray(state["delta"])[:real_count])
        radii.append(np.where(np.asarray(state["rate"]) > 0.5, np.asarray(state["radius"]), cap)[:real_count])
    return Perturbations(start.goals, jnp.asarray(np.concatenate(deltas)), np.concatenate(radii).astype(np.float32))


def zero_perturbations(model: Model, cap: float) -> Perturbations:
    """Return the start of a search over all classes: zero perturbations with the largest radius `cap`."""
    goals = np.arange(model.classes, dtype=np.int32)
    return Perturbations(goals, jnp.zeros((model.classes, *model.shape)), np.full(model.classes, cap, np.float32))


def l2_norms(deltas: jax.Array) -> jax.Array:
    """Return the L2 norm of each perturbation [P, H, W, C] as [P, 1, 1, 1], at least 1e-9."""
    return jnp.maximum(jnp.sqrt((deltas**2).sum((1, 2, 3), keepdims=True)), 1e-9)


def other_class_weights(labels: jax.Array, goals: jax.Array) -> jax.Array:
    """Return float32 [P, B]: 1 for an image of another class than the goal, 0 for an image of the goal's class."""
    return (labels[None] != goals[:, None]).astype(jnp.float32)


def hinge_loss(
    model: Model, variables: Variables, stamped: jax.Array, labels: jax.Array, goals: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Hinge loss of the search, and the number of images that each perturbation sends to its goal.

    Args:
      model: the classifier.
      variables: its variables; evaluation mode.
      stamped: float32 [P, B, H, W, C], the images with each trigger.
      labels: int32 [B].
      goals: int32 [P].

    Returns:
      The loss summed over all images that count, a scalar; the number of successes, float32 [P].
    """
    logits = model.logits(variables, stamped.reshape(-1, *model.shape)).reshape(*stamped.shape[:2], -1)
    is_label = jax.nn.one_hot(labels, model.classes, dtype=bool)[None]
    is_goal = jnp.where(
        (goals == ANY)[:, None, None], ~is_label, jax.nn.one_hot(goals, model.classes, dtype=bool)[:, None]
    )
    goal_logits = jnp.where(is_goal, logits, -jnp.inf).max(-1)
    other_logits = jnp.where(is_goal, -jnp.inf, logits).max(-1)
    weight = other_class_weights(labels, goals)
    return (jnp.maximum(0, other_logits - goal_logits + MARGIN) * weight).sum(), jnp.where(
        goal_logits > other_logits, weight, 0
    ).sum(1)


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """Return one step of all perturbations, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]
        goals = constants["goals"]

        def objective(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
            return hinge_loss(
                model, constants["variables"], jnp.clip(images[None] + delta[:, None], 0, 1), labels, goals
            )

        counted_images = other_class_weights(labels, goals).sum(1)
        (_, hits), gradient = jax.value_and_grad(objective, has_aux=True)(state["delta"])
        hits, gradient, counted_images = parallel.total((hits, gradient, counted_images), axis)
        rate = _AVERAGE * state["rate"] + (1 - _AVERAGE) * hits / jnp.maximum(counted_images, 1)
        factor = jnp.where(rate > _SUCCESS, _SHRINK, jnp.where(rate < _FAILURE, _GROW, 1.0))
        radius = jnp.minimum(state["radius"] * factor, constants["cap"])
        velocity = _MOMENTUM * state["velocity"] + gradient / l2_norms(gradient)
        length = radius[:, None, None, None]
        delta = state["delta"] - length / 5 * velocity / l2_norms(velocity)
        delta = delta * jnp.minimum(1, length / l2_norms(delta))
        return {"delta": delta, "velocity": velocity, "radius": radius, "rate": rate}, {}

    return step
