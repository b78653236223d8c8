"""Additive: detect a backdoor by the smallest universal perturbation that sends images to each class.

A variant of Neural Cleanse (B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural
Networks", IEEE Symposium on Security and Privacy 2019) with additive perturbations in place of masks (ours): blended,
smooth, sinusoidal and warped triggers lie in their span, which a small mask cannot express.

Threat model: the auditor has the model and clean labelled images, but no trigger.

For each class c, search the universal perturbation δ_c of smallest L2 radius r_c that sends images of other classes to
c (:mod:`bdjax.defenses._smallest`), all classes in one program. The score of a class is median(r) / r_c, and the model
is judged to be backdoored when r_c < threshold · median(r) for some c.
"""

from dataclasses import dataclass

import numpy as np

from bdjax.defenses import _targeted_search
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Scores, Victim


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the search and of the decision."""

    search_steps: int = 30
    """Steps of the search over all classes."""
    search_batch: int = 16
    """Images per step."""
    largest_radius: float = 0.1
    """Upper bound of the L2 norm, given as the value of a constant perturbation with that norm, in (0, 1]."""
    threshold: float = 0.7
    """A class is suspicious when its radius is below this fraction of the median, in (0, 1)."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("search_steps", "search_batch"), "at least 1", lambda v: v >= 1),
            (("largest_radius",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("threshold",), "in (0, 1)", lambda v: 0 < v < 1),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Detect classes that a much smaller perturbation reaches than the other classes.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the perturbations of the three most
        suspicious classes.
      key: draws the batches.

    Returns:
      For each class the median radius divided by its own; the model is judged to be backdoored above 1 / threshold.

    Raises:
      InputError: when there are fewer than two images.
    """
    settings = _targeted_search.Search(
        config.search_steps, config.search_batch, config.search_steps, config.largest_radius, config.threshold, 1, 0
    )
    perturbations = _targeted_search.search_all_classes(settings, victim, view, key, "additive")
    nearest = np.argsort(perturbations.radii, kind="stable")[:3]
    view.callback.on_round_end(
        0,
        victim.variables,
        perturbation=perturbations.deltas[nearest],
        perturbation_labels=perturbations.goals[nearest],
    )
    return _targeted_search.scores(settings, perturbations)
