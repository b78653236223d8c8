"""A stratified split without random numbers: the test images of a class are evenly spaced among its images."""

import numpy as np


def spread(count: int, chosen: int) -> np.ndarray:
    """Return a mask with evenly spaced True values: the middle of each of `chosen` equal intervals.

    Args:
      count: length of the mask.
      chosen: number of True values.

    Returns:
      bool [count].
    """
    mask = np.zeros(count, bool)
    mask[(2 * np.arange(chosen) + 1) * count // (2 * chosen or 1)] = True
    return mask
