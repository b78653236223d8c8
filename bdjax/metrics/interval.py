"""How far a rate that was measured on n images may be from the true one."""


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate of `right` in `n`: (low, high)."""
    from scipy.stats import binomtest

    ends = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(ends.low), float(ends.high)
