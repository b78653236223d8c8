"""What the tests of several data sources share."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bdjax.datasets import load
from bdjax.errors import InputError

SCANS = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)
TARGETS = np.asarray(load_digits(return_X_y=True)[1]).astype(int)


def says(spec: str) -> str:
    """The message of the InputError that loading `spec` ends in."""
    with pytest.raises(InputError) as caught:
        load(spec)
    return str(caught.value)


def assert_stored(data):
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.dtype == np.uint8 and x.flags.c_contiguous and x.ndim == 4
        assert y.dtype == np.int32 and y.shape == (len(x),)
