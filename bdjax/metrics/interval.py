"""Confidence interval of a rate measured on n images."""


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate.

    Args:
      correct: number of successes.
      n: number of trials.
      confidence: confidence level, in (0, 1).

    Returns:
      (lower bound, upper bound).
    """
    from scipy.stats import binomtest

    ends = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(ends.low), float(ends.high)


def clopper_pearson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate: exact, so that it covers the true rate at least as often as it says.

    Args:
      correct: number of successes.
      n: number of trials.
      confidence: confidence level, in (0, 1).

    Returns:
      (lower bound, upper bound).
    """
    from scipy.stats import binomtest

    ends = binomtest(correct, n).proportion_ci(confidence, method="exact")
    return float(ends.low), float(ends.high)
