"""BadNets' squares: where they stand and what they show, beside NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import badnets
from bdjax.errors import InputError

KEY = jax.random.key(5)


def squares(changed, size):
    """Corners of the one square that differs in each image of `changed` [N, H, W]."""
    corners = []
    for image in changed:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert image.sum() == size * size == len(rows) * len(columns)
        corners.append((int(rows[0]), int(columns[0])))
    return corners


def test_a_pattern_is_the_same_at_every_place_and_for_every_key():
    config = badnets.Config(size=3, margin=0, position="random", pattern=4)
    images = jnp.zeros((300, 7, 8, 2))
    expected = np.asarray(jax.random.uniform(jax.random.key(4), (3, 3, 2)))
    seen = set()
    for key in jax.random.split(KEY):
        found = np.asarray(badnets.trigger(config, images, key, {}))
        for image, (row, column) in zip(found, squares((found != 0).any(-1), 3), strict=True):
            np.testing.assert_array_equal(image[row : row + 3, column : column + 3], expected)
            seen.add((row, column))
    assert seen == {(row, column) for row in range(5) for column in range(6)}  # the last row and column, too


def test_another_seed_is_another_pattern_and_none_is_the_colour():
    images = jnp.full((1, 8, 8, 3), 0.5)
    first, second = (badnets.trigger(badnets.Config(size=2, margin=1, pattern=p), images, KEY, {}) for p in (0, 1))
    assert squares(np.asarray(first != second).any(-1), 2) == [(5, 5)]
    plain = badnets.trigger(badnets.Config(size=2, margin=1, colour=(0.0, 0.25, 1.0)), images, KEY, {})
    np.testing.assert_array_equal(plain[0, 5:7, 5:7], np.broadcast_to([0, 0.25, 1], (2, 2, 3)))


@pytest.mark.parametrize("pattern", [-1, 2**32])
def test_a_pattern_is_a_seed(pattern):
    with pytest.raises(InputError, match=f"attack.pattern is a seed.*{pattern}"):
        badnets.Config(pattern=pattern)
