"""The universal perturbation as an audit: its class, its norm, the distance it is set beside."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from quarters import Seen, clean_images, victim

from bdjax.defenses import universal
from bdjax.errors import InputError

KEY = jax.random.key(0)


@pytest.fixture
def view():
    """Class 1 is rare: among equal classes the pixel's gradient would cancel, by the symmetry of the toy."""
    everything = clean_images()
    keep = (everything.labels != 1) | (np.arange(80) < 20)
    return dataclasses.replace(everything, images=everything.images[keep], labels=everything.labels[keep])


def measured(planted, view, **changes):
    watched = dataclasses.replace(view, callback=Seen())
    found = universal.detect(universal.Config(batch_size=20, **changes), victim(planted), watched, KEY)
    return found, watched.callback.arrays


def test_a_planted_pixel_turns_all_images_at_a_small_part_of_their_distance(view):
    found, seen = measured(True, view)
    clean, unplanted = measured(False, view)
    assert (found.target, found.poisoned) == (1, True) and found.score > 0.9
    assert not clean.poisoned and seen["norm"] < 0.5 * unplanted["norm"]


def test_the_norm_is_the_smallest_of_the_lengths_that_turn_enough_images(view):
    """The reported length turns enough images, one step of the scale less does not."""
    found, seen = measured(True, view, scales=20, enough=0.8)
    subject, images = victim(True), view.images.astype(np.float32) / 255
    distance = universal._distance(images, view.labels)
    length = np.linalg.norm(seen["perturbation"])
    assert_allclose(length / distance, seen["norm"], rtol=1e-5)
    others = view.labels != found.target

    def turned(scale):
        moved = np.clip(images + scale * seen["perturbation"], 0, 1)
        return (np.asarray(subject.model.logits(subject.variables, moved)).argmax(1) == found.target)[others].mean()

    assert turned(1.0) >= 0.8 > turned(1 - distance / 20 / length)


def test_the_distance_is_the_median_to_the_nearest_of_another_class():
    images = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0], [6.0, 8.0]])[:, :, None, None]
    assert universal._distance(images, np.array([0, 1, 1, 1])) == 3.5  # of 2, 5, 2 and 10
    with pytest.raises(InputError, match="two classes or more"):
        universal._distance(images, np.zeros(4, int))


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"defense.enough must be in \(0, 1\], got 0"):
        universal.Config(enough=0)
