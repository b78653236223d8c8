"""Detection by a universal perturbation: its class, its norm, and the distance that is its unit."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from quarters import Seen, clean_images, victim

from bdjax.detectors import universal
from bdjax.errors import InputError

KEY = jax.random.key(0)


@pytest.fixture
def view():
    """Class 1 is rare: with equal classes the pixel's gradient would cancel by symmetry."""
    full = clean_images()
    keep = (full.labels != 1) | (np.arange(80) < 20)
    return dataclasses.replace(full, images=full.images[keep], labels=full.labels[keep])


def detect(planted, view, **changes):
    observed = dataclasses.replace(view, callback=Seen())
    scores = universal.detect(universal.Config(batch_size=20, **changes), victim(planted), observed, KEY)
    return scores, observed.callback.arrays


def test_a_backdoor_pixel_moves_all_images_at_a_small_fraction_of_their_distance(view):
    scores, arrays = detect(True, view)
    clean_scores, clean_arrays = detect(False, view)
    assert (scores.target, scores.poisoned) == (1, True) and scores.score > 0.9
    assert not clean_scores.poisoned and arrays["norm"] < 0.5 * clean_arrays["norm"]


def test_the_norm_is_the_smallest_length_that_moves_enough_images(view):
    """The reported length moves enough images, the next smaller length does not."""
    scores, arrays = detect(True, view, scales=20, enough=0.8)
    artifact, images = victim(True), view.images.astype(np.float32) / 255
    distance = universal._distance(images, view.labels)
    length = np.linalg.norm(arrays["perturbation"])
    assert_allclose(length / distance, arrays["norm"], rtol=1e-5)
    others = view.labels != scores.target

    def moved_rate(scale):
        changed = np.clip(images + scale * arrays["perturbation"], 0, 1)
        return (np.asarray(artifact.model.logits(artifact.variables, changed)).argmax(1) == scores.target)[
            others
        ].mean()

    assert moved_rate(1.0) >= 0.8 > moved_rate(1 - distance / 20 / length)


def test_the_distance_is_the_median_to_the_nearest_of_another_class():
    images = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0], [6.0, 8.0]])[:, :, None, None]
    assert universal._distance(images, np.array([0, 1, 1, 1])) == 3.5  # of 2, 5, 2 and 10
    with pytest.raises(InputError, match="two classes or more"):
        universal._distance(images, np.zeros(4, int))


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"detector.enough must be in \(0, 1\], got 0"):
        universal.Config(enough=0)
