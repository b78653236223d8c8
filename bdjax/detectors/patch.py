"""Patch: detect a backdoor by the smallest patch that sends clean images to each class, found in few steps.

The idea is that of Neural Cleanse (B. Wang, Y. Yao, S. Shan, H. Li, B. Viswanath, H. Zheng and B. Y. Zhao, "Neural
Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE Symposium on Security and Privacy 2019);
:mod:`bdjax.detectors.neural_cleanse` is that method with its own schedule, which takes many times as long.

Threat model: the auditor has the model and some clean labelled images (50 are enough), but no trigger.

For each class c, a mask m and a pattern p minimise a hinge loss of (1 − m) x + m p towards c plus a cost of the mask's
area, which rises while the patch succeeds and falls while it does not (:mod:`bdjax.defenses._patches`); all classes run
in one program. The statistic of a class is −log of the smallest area that succeeded. Its p-value compares the class
with the others (:func:`bdjax.metrics.outlier_p_values`).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from bdjax.defenses import _patches
from bdjax.detectors._evidence import FREEDOM, LARGEST_LEVEL, check_images, scores_of
from bdjax.errors import check_fields
from bdjax.metrics import Prior
from bdjax.types import DefenderView, Key, Scores, Victim


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the search and of the decision."""

    steps: int = 160
    """Steps of the search."""
    batch_size: int = 24
    """Images per step for each class, with ten classes or fewer; 240 divided by the number of classes with more, but at
    least 5."""
    deviation: float = 0.45
    """Typical standard deviation of the logarithm of the areas between the classes of a clean model, the prior of the
    measured one; positive. Chosen on 39 clean models (experiments/results/audit)."""
    level: float = 0.05
    """The model is judged to be backdoored when its p-value is at most this, in (0, 0.3]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("steps", "batch_size"), "at least 1", lambda v: v >= 1),
            (("deviation",), "positive", lambda v: v > 0),
            (("level",), f"in (0, {LARGEST_LEVEL}]", lambda v: 0 < v <= LARGEST_LEVEL),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Compare the areas of the smallest patches of the classes.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the patches of the three most
        suspicious classes on a black background.
      key: draws the batches.

    Returns:
      For each class −log of the area of its patch relative to the median, with the p-value of the model.

    Raises:
      InputError: when there are fewer than two images.
    """
    check_images("patch", view)
    patches = _patches.search(
        victim.model, victim.variables, view.images, view.labels, np.arange(victim.model.classes, dtype=np.int32),
        config.steps, key, tick=partial(view.callback.on_progress, "smallest patch of every class"),
        batch_size=config.batch_size,
    )  # fmt: skip
    nearest = np.argsort(patches.areas, kind="stable")[:3]
    view.callback.on_round_end(
        0,
        victim.variables,
        recovered=np.asarray(patches.masks * patches.patterns)[nearest],
        recovered_labels=nearest,
    )
    statistics = -np.log(np.maximum(patches.areas, 1e-3))
    return scores_of(statistics, config.level, Prior(config.deviation, FREEDOM))
