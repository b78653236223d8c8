"""Additive: detect a backdoor by the smallest universal perturbation that sends images to each class.

A variant of Neural Cleanse (B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
Networks", IEEE Symposium on Security and Privacy 2019) with additive perturbations in place of masks, as in Z. Xiang,
D. J. Miller and G. Kesidis, "Detection of Backdoors in Trained Classifiers Without Access to the Training Set", IEEE
Transactions on Neural Networks and Learning Systems 2020, arXiv:1908.10498: blended, smooth, sinusoidal and warped
triggers lie in their span, which a small mask cannot express.

Threat model: the auditor has the model and some clean labelled images (50 are enough), but no trigger.

For each class c, search the universal perturbation δ_c of smallest L2 norm that sends images of other classes to c
(:mod:`bdjax.defenses._smallest`), all classes in one program. Then r_c is the smallest norm at which a multiple of δ_c
sends `success` of all images there, found by bisection. The statistic of a class is −log r_c; its p-value compares the
class with the others (:func:`bdjax.metrics.outlier_p_values`).

Deviations:

- Direction and radius are searched separately, in a fixed number of steps (ours).
- The null distribution of r is a log-normal one, for which the p-value is exact, in place of a Gamma distribution that
  is fitted to 1 / r of the other classes (ours).
- The paper searches every pair of a source and a target class; here this is `sources="each"`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from bdjax.defenses import _smallest
from bdjax.defenses._batch import images_per_goal
from bdjax.detectors._evidence import FREEDOM, LARGEST_LEVEL, check_images, pair_scores, scores_of
from bdjax.detectors._norms import norms_at
from bdjax.errors import check_fields
from bdjax.metrics import Prior
from bdjax.types import DefenderView, Key, Scores, Victim


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the search and of the decision."""

    steps: int = 60
    """Steps of the search."""
    batch_size: int = 20
    """Images per step for each class, with ten classes or fewer; 200 divided by the number of classes with more, but at
    least 5."""
    largest_radius: float = 0.3
    """Upper bound of the L2 norm, given as the value of a constant perturbation with that norm, in (0, 1]."""
    success: float = 0.8
    """Fraction of the images of other classes that a perturbation must send to its class, in (0, 1)."""
    deviation: float = 0.15
    """Typical standard deviation of log r_c between the classes of a clean model, the prior of the measured one;
    positive. Chosen on 39 clean models (experiments/results/audit)."""
    sources: Literal["all", "each"] = "all"
    """all: a perturbation must work on images of all other classes; each: every pair of a source and a target class is
    searched, which takes as many times as long as there are classes."""
    level: float = 0.05
    """The model is judged to be backdoored when its p-value is at most this, in (0, 0.3]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("steps", "batch_size"), "at least 1", lambda v: v >= 1),
            (("largest_radius",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("success",), "in (0, 1)", lambda v: 0 < v < 1),
            (("deviation",), "positive", lambda v: v > 0),
            (("level",), f"in (0, {LARGEST_LEVEL}]", lambda v: 0 < v <= LARGEST_LEVEL),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Compare the radii of the smallest perturbations of the classes.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the perturbations of the three most
        suspicious classes.
      key: draws the batches.

    Returns:
      For each class −log of its radius relative to the median, with the p-value of the model.

    Raises:
      InputError: when there are fewer than two images.
    """
    check_images("additive", view)
    if config.sources == "each":
        return pair_scores(-np.log(_radii_by_source(config, victim, view, key)), config.level)
    perturbations = _search(config, victim, view, np.arange(len(view.labels)), key)
    norms = norms_at(config.success, victim, view.images, view.labels, perturbations)
    nearest = np.argsort(norms, kind="stable")[:3]
    view.callback.on_round_end(
        0,
        victim.variables,
        perturbation=perturbations.deltas[nearest],
        perturbation_labels=perturbations.goals[nearest],
    )
    return scores_of(-np.log(norms), config.level, Prior(config.deviation, FREEDOM))


def _search(
    config: Config, victim: Victim, view: DefenderView, positions: np.ndarray, key: Key
) -> _smallest.Perturbations:
    """Search the smallest perturbation to every class on some of the images."""
    cap = _smallest.norm_limit(victim.model, config.largest_radius)
    return _smallest.search(
        victim.model, victim.variables, view.images[positions], view.labels[positions],
        _smallest.zero_perturbations(victim.model, cap), config.steps,
        images_per_goal(config.batch_size, victim.model.classes), cap, key,
        partial(view.callback.on_progress, "smallest perturbation of every class"),
    )  # fmt: skip


def _radii_by_source(config: Config, victim: Victim, view: DefenderView, key: Key) -> np.ndarray:
    """Radii [C, C] of the perturbations that send images of one class (row) to another (column); NaN without images."""
    classes = victim.model.classes
    radii = np.full((classes, classes), np.nan)
    count = int(np.clip(len(view.labels) // classes, 2, config.batch_size))  # the same for all classes: one program
    for source in range(classes):
        positions = np.flatnonzero(view.labels == source)
        if len(positions):
            perturbations = _search(config, victim, view, np.resize(positions, count), key)
            radii[source] = np.maximum(perturbations.radii, 1e-6)
    return radii
