"""scikit-learn's handwritten digits: 1,797 scans that are part of the package, so that no file or network is needed.

The 8x8 scans with values 0..16 are scaled to 0..255 and enlarged to 32x32 by bilinear interpolation. Source: Alpaydin
and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (the test half).
"""

import numpy as np

from bdjax.datasets import _checks
from bdjax.datasets._stratify import spread
from bdjax.errors import InputError
from bdjax.types import Data

SIDE = 32
TEST = 797


def load(rest: str = "") -> Data:
    """Load the digits: 1,000 training and 797 test images uint8 [N, 32, 32, 1], classes "0" to "9".

    The split is stratified and fixed: 797/1797 of the images of every class, rounded so that the sum is 797, are test
    images, evenly spaced in scikit-learn's order. Both splits are in that order.

    Args:
      rest: text after the colon of the specification; must be empty.

    Returns:
      The data set.

    Raises:
      InputError: when `rest` is not empty.
    """
    if rest:
        raise InputError(f"the data set `digits` has no options after a colon, got {rest!r}. Write `digits`.")
    from PIL import Image
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    small = np.round(np.asarray(scans).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(s).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for s in small]
    labels = np.asarray(labels)
    test = _test_mask(labels)
    x = np.stack(images)
    return _checks.check_data("digits", x[~test], labels[~test], x[test], labels[test], [str(c) for c in range(10)])


def _test_mask(labels: np.ndarray) -> np.ndarray:
    """Return bool [N], True for the TEST images of the test split."""
    counts = np.bincount(labels)
    exact = counts * TEST / len(labels)
    quota = np.floor(exact).astype(int)
    # largest remainders first, so that the quotas sum to TEST
    quota[np.argsort(quota - exact, kind="stable")[: TEST - quota.sum()]] += 1
    mask = np.zeros(len(labels), bool)
    for label, (count, chosen) in enumerate(zip(counts, quota, strict=True)):
        mask[labels == label] = spread(int(count), int(chosen))
    return mask
