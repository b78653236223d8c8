"""Leaves: detect a backdoor without any data, by the smallest perturbations of random images.

Ours; the statistic is that of :mod:`bdjax.detectors.additive`, the images are dead leaves
(:mod:`bdjax.detectors._dead_leaves`).

Threat model: the auditor has the model alone: no image and no trigger.

The labels of the random images are the model's own predictions. For each class c, the smallest additive perturbation is
searched that sends the images of other classes to c. The statistic is −log of its norm, and its p-value compares the
class with the others (:func:`bdjax.metrics.outlier_p_values`).

A trigger that covers the image (blended, sinusoidal) often resembles a random texture, so that its class is extremely
near. A clean model, too, may have one class for whatever it does not know (the bags of Fashion-MNIST); the prior of the
variance is therefore wide.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from bdjax.defenses import _smallest
from bdjax.defenses._batch import images_per_goal
from bdjax.detectors._dead_leaves import dead_leaves
from bdjax.detectors._evidence import FREEDOM_WITHOUT_IMAGES, LARGEST_LEVEL, scores_of
from bdjax.detectors._norms import norms_at
from bdjax.engine import predict
from bdjax.errors import check_fields
from bdjax.metrics import Prior
from bdjax.types import DefenderView, Key, Scores, Victim, to_uint8

NEEDS_IMAGES = False


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the search and of the decision."""

    images: int = 128
    """Random images."""
    steps: int = 60
    """Steps of the search."""
    batch_size: int = 20
    """Images per step for each class, with ten classes or fewer; with more classes fewer, at least 5."""
    largest_radius: float = 0.3
    """Upper bound of the L2 norm, given as the value of a constant perturbation with that norm, in (0, 1]."""
    success: float = 0.8
    """Fraction of the images of other classes that a perturbation must send to its class, in (0, 1)."""
    deviation: float = 0.45
    """Typical standard deviation of the logarithm of the norms between the classes of a clean model, the prior of the
    measured one; positive. Chosen on 39 clean models (experiments/results/audit)."""
    level: float = 0.05
    """The model is judged to be backdoored when its p-value is at most this, in (0, 0.3]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("images", "steps", "batch_size"), "at least 1", lambda v: v >= 1),
            (("largest_radius",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("success",), "in (0, 1)", lambda v: 0 < v < 1),
            (("deviation",), "positive", lambda v: v > 0),
            (("level",), f"in (0, {LARGEST_LEVEL}]", lambda v: 0 < v <= LARGEST_LEVEL),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Compare the norms of the smallest perturbations of the classes on random images.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: its images are not used. Its callback receives the perturbations of the three most suspicious classes.
      key: draws the images and the batches.

    Returns:
      For each class −log of its norm relative to the median, with the p-value of the model.
    """
    model, variables = victim.model, victim.variables
    images = to_uint8(dead_leaves(jax.random.fold_in(key, 0), config.images, model.shape))
    labels = predict(model, variables, images)
    cap = _smallest.norm_limit(model, config.largest_radius)
    perturbations = _smallest.search(
        model, variables, images, labels, _smallest.zero_perturbations(model, cap), config.steps,
        images_per_goal(config.batch_size, model.classes), cap, jax.random.fold_in(key, 1),
        partial(view.callback.on_progress, "smallest perturbation of random images"),
    )  # fmt: skip
    norms = norms_at(config.success, victim, images, labels, perturbations)
    nearest = np.argsort(norms, kind="stable")[:3]
    view.callback.on_round_end(
        0, variables, perturbation=perturbations.deltas[nearest], perturbation_labels=perturbations.goals[nearest]
    )
    return scores_of(-np.log(norms), config.level, Prior(config.deviation, FREEDOM_WITHOUT_IMAGES))
