"""A stratified split without random numbers: the test images of a class are spread evenly over its images."""

import numpy as np


def spread(count: int, chosen: int) -> np.ndarray:
    """bool [count] with exactly `chosen` True, evenly spaced: the middle one of each of `chosen` equal stretches."""
    mask = np.zeros(count, bool)
    mask[(2 * np.arange(chosen) + 1) * count // (2 * chosen or 1)] = True
    return mask
