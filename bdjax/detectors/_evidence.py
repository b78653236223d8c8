"""From one statistic per class to scores with a p-value, for the detectors that compare classes with each other."""

import warnings

import numpy as np

from bdjax.errors import InputError
from bdjax.metrics import Prior, model_p_value, outlier_p_values, outliers
from bdjax.types import DefenderView, Scores

LARGEST_LEVEL = 0.3
"""Largest level of a test: above it the p-value of a model is not exact (:mod:`bdjax.metrics.significance`)."""
FREEDOM = 30.0
"""Weight of the prior for the variance between classes, in degrees of freedom, of detectors with clean images."""
FREEDOM_WITHOUT_IMAGES = 10.0
"""The same for detectors without images, whose statistics differ more between models."""


SIMILAR = 0.5
"""Distance from the median, relative to that of the most suspicious class, from which another outlier is accused, too.
Triggers of one attack on several classes are about equally small; a class that is merely nearer than most is not."""


def scores_of(statistics: np.ndarray, level: float, prior: Prior | None = None) -> Scores:
    """Score classes by how far their statistic lies above the others.

    Classes that are unusually hard to reach say nothing about a backdoor, but they would widen the distribution: with a
    prior, statistics are raised to at least its deviation below the median.

    Args:
      statistics: float [C], larger for a more suspicious class, about normally distributed over the classes of a clean
        model (the logarithm of a norm, an area or a margin); NaN where a class could not be measured.
      level: the model is judged to be backdoored when its p-value is at most this.
      prior: of the standard deviation between the classes of a clean model; None: it is measured alone.

    Returns:
      Scores: for each class its statistic minus the median, the p-value of the model, and all classes that are
      outliers at the level (at most a quarter of the classes) and at least `SIMILAR` times as far from the median as
      the farthest one.
    """
    statistics = np.asarray(statistics, np.float64)
    finite = np.isfinite(statistics)
    relative = np.where(finite, statistics - np.median(statistics[finite]) if finite.any() else 0, np.nan)
    target = int(np.nanargmax(relative)) if finite.any() else 0
    compared = relative if prior is None else np.maximum(relative, -prior.deviation)
    targets = tuple(
        label for label in outliers(compared, level, max(1, len(statistics) // 4), prior)
        if relative[label] >= SIMILAR * relative[target]
    )  # fmt: skip
    p_value = model_p_value(outlier_p_values(compared, prior))
    return Scores(relative.astype(np.float32), target, float(relative[target]), bool(targets), p_value, targets)


def pair_scores(statistics: np.ndarray, level: float) -> Scores:
    """Score classes by the pairs of a source and a target class, for triggers that work on one class alone.

    A pair's value is its statistic minus the means of its source and of its target, so that a class that is near to all
    others does not count. The values of all pairs are compared with each other.

    Args:
      statistics: float [C, C], row: source class, column: target class; NaN where a pair could not be measured. The
        diagonal is ignored.
      level: the model is judged to be backdoored when its p-value is at most this.

    Returns:
      Scores: for each target class the largest value of its pairs, and the p-value over all pairs.
    """
    values = np.array(statistics, np.float64)
    np.fill_diagonal(values, np.nan)
    measured = np.isfinite(values)
    values[~measured] = np.nan
    if not measured.any():
        return Scores(np.full(len(values), np.nan, np.float32), 0, float("nan"), False, 1.0)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of classes without an image
        values = values - np.nanmean(values, 1, keepdims=True) - np.nanmean(values, 0, keepdims=True)
        classes = np.nanmax(values + np.nanmean(values), 0)
    pairs = outliers(values.ravel(), level, max(1, int(measured.sum()) // 4))
    p_value = model_p_value(outlier_p_values(values[measured]))
    targets = tuple(dict.fromkeys(pair % len(values) for pair in pairs))
    target = targets[0] if targets else int(np.nanargmax(classes))
    return Scores(classes.astype(np.float32), target, float(classes[target]), bool(targets), p_value, targets)


def check_images(method: str, view: DefenderView) -> None:
    """Check that a detector has images to search on. Raises InputError when there are fewer than two."""
    if len(view.labels) < 2:
        raise InputError(
            f"{method} got {len(view.labels)} clean images; it needs two at the least, and 100 are better. Give more "
            "by --clean-data or --size, or use detectors that need none."
        )
