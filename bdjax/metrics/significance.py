"""p-values of an audit: is one class of a model an outlier, and what do several detectors say together?

A detector measures one statistic for each of C classes, large where a class looks like a backdoor's target. Under the
null hypothesis "no class is special" the C values are independent draws of one normal distribution of unknown mean and
variance (detectors take the logarithm of norms and areas). :func:`outlier_p_values` is then exact for every class, and
C times the smallest of them is exact for the model as long as it is below about 0.3, since two classes cannot both be
that extreme (F. E. Grubbs, "Sample Criteria for Testing Outlying Observations", Annals of Mathematical Statistics 21,
1950).

Classes of a real data set are not exchangeable: a digit 1 is nearer to all images than an 8 in clean models, too. Where
clean models of the same data set are at hand, :func:`reference_p_values` compares each class with itself.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Prior(NamedTuple):
    """What is known of the variance of a statistic between the classes of a clean model, before it is measured."""

    deviation: float
    """Typical standard deviation between classes; positive."""
    freedom: float
    """Weight of the prior, in degrees of freedom; zero or more."""


def outlier_p_values(values: np.ndarray, prior: Prior | None = None) -> np.ndarray:
    """p-value of each class for being larger than the others: the studentised deleted residual.

    With mean m and standard deviation s of the other C − 1 values, t = (v − m) / (s √(1 + 1 / (C − 1))) follows
    Student's distribution with C − 2 degrees of freedom under the null hypothesis. A variance that is measured on nine
    classes is uncertain: with a prior, s² becomes the mean of the prior's and the measured variance, weighted by their
    degrees of freedom, which add up (the moderated t-statistic, G. K. Smyth, "Linear Models and Empirical Bayes Methods
    for Assessing Differential Expression in Microarray Experiments", Statistical Applications in Genetics and Molecular
    Biology 3, 2004).

    Args:
      values: float [C]; not finite where a class could not be measured: these are left out.
      prior: of the standard deviation; None: it is measured alone.

    Returns:
      float64 [C] in [0, 1]; 1 where a class was left out, and everywhere when fewer than four values remain.
    """
    values = np.asarray(values, np.float64)
    p_values = np.ones(len(values))
    measured = np.isfinite(values)
    if measured.sum() < 4:
        return p_values
    p_values[measured] = _deleted_residual_p_values(values[measured], prior or Prior(1.0, 0.0))
    return p_values


def model_p_value(p_values: np.ndarray) -> float:
    """p-value of a model from those of its classes: the smallest, corrected for the choice among C (Bonferroni)."""
    return float(min(1.0, len(p_values) * np.min(p_values))) if len(p_values) else 1.0


def outliers(values: np.ndarray, level: float, most: int, prior: Prior | None = None) -> tuple[int, ...]:
    """The classes that are outliers at a level, allowing for several (the generalised ESD test, one-sided).

    The largest value is removed again and again; the number of outliers is the largest k for which the k-th removed
    value is an outlier among those that were left (B. Rosner, "Percentage Points for a Generalized ESD Many-Outlier
    Procedure", Technometrics 25, 1983). Two equal outliers, each of which hides the other, are thus both found.

    Args:
      values: float [C].
      level: of each test, in (0, 1).
      most: largest number of outliers.
      prior: of the standard deviation; None: it is measured alone.

    Returns:
      The classes, most extreme first; empty when there is none.
    """
    remaining = np.array(values, np.float64)
    removed: list[int] = []
    count = 0
    for position in range(1, most + 1):
        p_values = outlier_p_values(remaining, prior)
        measured = int(np.isfinite(remaining).sum())
        if measured < 4:
            break
        largest = int(np.nanargmax(np.where(np.isfinite(remaining), remaining, -np.inf)))
        removed.append(largest)
        if min(1.0, measured * p_values[largest]) <= level:
            count = position
        remaining[largest] = np.nan
    return tuple(removed[:count])


def reference_p_values(values: np.ndarray, references: np.ndarray) -> np.ndarray:
    """p-value of each class by comparison with the same class of clean models (an empirical null).

    Each model is centred on its median class first, because the scale differs between models. The residuals of the R
    reference models around the mean of each class share one variance, with (R − 1) (C − 1) degrees of freedom; a new
    model's deviation from the class mean has that variance times 1 + 1 / R.

    Args:
      values: statistics of the audited model, float [C].
      references: statistics of R clean models of the same data set, float [R, C], R at least 2.

    Returns:
      float64 [C] in [0, 1]; 1 where a class could not be measured.
    """
    from scipy import stats

    def centred(rows: np.ndarray) -> np.ndarray:
        rows = np.where(np.isfinite(rows), rows, np.nan)
        return np.asarray(rows - np.nanmedian(rows, axis=-1, keepdims=True))

    rows = centred(np.asarray(references, np.float64))
    count, classes = rows.shape
    mean = np.nanmean(rows, axis=0)
    freedom = max(1, (count - 1) * (classes - 1))
    deviation = np.sqrt(np.nansum((rows - mean) ** 2) / freedom)
    t = (centred(np.asarray(values, np.float64)) - mean) / np.maximum(deviation * np.sqrt(1 + 1 / count), 1e-12)
    return np.where(np.isfinite(t), stats.t.sf(np.where(np.isfinite(t), t, 0), freedom), 1.0)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests, adjusted so that rejecting those below a level errs at most that often (Holm).

    S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979. The
    i-th smallest of m p-values becomes the largest of (m − j + 1) p_(j) over j up to i, at most 1. The tests may depend
    on each other.

    Args:
      p_values: by name of the test.

    Returns:
      Adjusted p-values by name, in the same order.
    """
    order = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _deleted_residual_p_values(values: np.ndarray, prior: Prior) -> np.ndarray:
    """:func:`outlier_p_values` of finite values."""
    from scipy import stats

    count = len(values)
    scale = max(1e-12, 1e-9 * float(np.abs(values).max()))  # equal values are no outliers
    values = values - np.median(values)
    means = (values.sum() - values) / (count - 1)
    squares = np.square(values).sum() - np.square(values) - (count - 1) * np.square(means)
    freedom = count - 2 + prior.freedom
    variances = (np.maximum(squares, 0) + prior.freedom * prior.deviation**2) / freedom
    deviations = np.sqrt(variances * (1 + 1 / (count - 1)))
    return np.asarray(stats.t.sf((values - means) / np.maximum(deviations, scale), freedom))
