"""The norm at which a perturbation sends a given fraction of the images to its class."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._smallest import Perturbations
from bdjax.types import Model, Victim, to_float

_HALVINGS = 9
"""Steps of the bisection: the multiple is known to 2 / 2^9."""
_LARGEST = 2.0
"""Largest multiple of a perturbation."""
_IMAGES, _FEWEST_IMAGES = 256, 64
"""Images that are counted for each class, at most: with up to ten classes, and with very many."""


def norms_at(
    success: float, victim: Victim, images: np.ndarray, labels: np.ndarray, perturbations: Perturbations
) -> np.ndarray:  # fmt: skip
    """Find, by bisection, the smallest multiple of each perturbation that reaches a success rate.

    Args:
      success: fraction of the images of other classes that must be sent to the class of a perturbation, in (0, 1).
      victim: the model.
      images: stored [n, H, W, C]; the first 256 are used, fewer with more than ten classes.
      labels: int32 [n].
      perturbations: P perturbations of any norm.

    Returns:
      float64 [P], L2 norms, at least 1e-6; twice the largest perturbation's norm where no multiple reaches the rate.
    """
    count = int(np.clip(10 * _IMAGES // len(perturbations.goals), _FEWEST_IMAGES, _IMAGES))
    counted, classes = to_float(images[:count]), jnp.asarray(labels[:count])
    lower, upper = np.zeros(len(perturbations.goals)), np.full(len(perturbations.goals), _LARGEST)
    ever_reached = np.zeros(len(perturbations.goals), bool)
    goals = [jnp.int32(goal) for goal in perturbations.goals]
    for _ in range(_HALVINGS):
        middle = (lower + upper) / 2
        rates = np.array([
            float(_success_rate(victim.model, victim.variables, counted, classes, goal, delta, jnp.float32(factor)))
            for goal, delta, factor in zip(goals, perturbations.deltas, middle, strict=True)
        ])  # fmt: skip
        reached = rates >= success
        ever_reached |= reached
        lower, upper = np.where(reached, lower, middle), np.where(reached, middle, upper)
    norms = np.linalg.norm(np.asarray(perturbations.deltas).reshape(len(upper), -1), axis=1)
    return np.maximum(np.where(ever_reached, upper * norms, _LARGEST * norms.max()), 1e-6)


@partial(jax.jit, static_argnums=0)
def _success_rate(
    model: Model, variables: Any, images: jax.Array, labels: jax.Array, goal: jax.Array, delta: jax.Array,
    factor: jax.Array,
) -> jax.Array:  # fmt: skip
    """Fraction of the images of other classes that image + factor * delta sends to the goal."""
    predictions = model.logits(variables, jnp.clip(images + factor * delta, 0, 1)).argmax(-1)
    weights = (labels != goal).astype(jnp.float32)
    hits = jnp.where(predictions == goal, weights, 0)
    return hits.sum() / jnp.maximum(weights.sum(), 1)
