"""Detectors by comparison of classes: margins of linear models, random images, pairs of classes, sources."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quarters import clean_images, victim
from scipy.optimize import linprog

from bdjax.detectors import _dead_leaves, _evidence, additive, leaves, mm_bd, patch, synthetic
from bdjax.detectors._evidence import scores_of
from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.metrics import Prior
from bdjax.types import DefenderView, Model, Victim

KEY = jax.random.key(3)
NO_IMAGES = DefenderView(np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int32))


def linear(weights, bias):
    """logits = the image, flattened, times `weights` plus `bias`."""

    def apply(variables, images, train=False, keys=None, axis_name=None):
        flat = images.reshape(len(images), -1)
        return flat @ variables["params"]["weights"] + variables["params"]["bias"], {"flat": flat}, {}

    params = {"weights": jnp.asarray(weights, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    model = Model("linear", (4, 4, 1), weights.shape[1], None, apply)
    return Victim(model, {"params": params, "batch_stats": {}})


@pytest.fixture(scope="module")
def margins():
    """The largest margin of each class of a linear classifier over the box [0, 1]^16, by linear programming."""
    rng = np.random.default_rng(1)
    weights, bias = rng.normal(size=(16, 5)), rng.normal(size=5)
    weights[:, 2] *= 3
    exact = []
    for label in range(5):
        others = [k for k in range(5) if k != label]
        slopes = np.stack([np.append(weights[:, k] - weights[:, label], 1.0) for k in others])
        solved = linprog(np.append(np.zeros(16), -1), slopes, [bias[label] - bias[k] for k in others],
                         bounds=[(0, 1)] * 16 + [(None, None)])  # fmt: skip
        exact.append(-solved.fun)
    return linear(weights, bias), np.array(exact)


@pytest.mark.parametrize(("optimizer", "rate", "steps"), [("adam", 0.05, 150), ("release", 0.01, 600)])
def test_the_largest_margins_of_a_linear_classifier_in_a_box(margins, optimizer, rate, steps):
    subject, exact = margins
    config = mm_bd.Config(images=4, steps=steps, optimizer=optimizer, learning_rate=rate)
    reached, inputs = mm_bd.largest_margins(config, subject, NO_IMAGES, KEY)
    assert (reached <= exact + 1e-4).all()
    np.testing.assert_allclose(reached, exact, rtol=0.05)
    assert inputs.shape == (5, 4, 4, 1) and inputs.min() >= 0 and inputs.max() <= 1


def test_the_class_with_an_unusual_margin_is_accused_without_an_image(margins):
    scores = mm_bd.detect(mm_bd.Config(level=0.3), margins[0], NO_IMAGES, KEY)
    assert scores.target == 2 and scores.classes[2] == scores.classes.max() and 0 < scores.p_value < 1


@pytest.mark.parametrize("detector", [leaves, mm_bd, synthetic])
def test_detectors_without_images_are_the_same_on_four_devices(detector, margins):
    config = dataclasses.replace(detector.Config(), steps=6)
    results = []
    for devices in (1, 4):
        with parallel.using(devices):
            results.append(detector.detect(config, margins[0], NO_IMAGES, KEY).classes)
    assert np.isfinite(results[0]).all()
    np.testing.assert_allclose(*results, atol=0.05)


def test_patch_names_the_class_of_a_planted_pixel():
    view = clean_images()
    for planted in (True, False):
        scores = patch.detect(patch.Config(level=0.05), victim(planted), view, KEY)
        assert scores.poisoned is planted
        if planted:
            assert scores.target == 1 and scores.targets == (1,) and scores.p_value <= 0.05
    assert view.callback.arrays["recovered"].shape == (3, 4, 4, 1)


def test_a_detector_that_needs_images_says_so():
    for detector in (additive, patch):
        with pytest.raises(InputError, match=r"got 0 clean images; it needs two at the least"):
            detector.detect(detector.Config(), victim(True), NO_IMAGES, KEY)
    with pytest.raises(InputError, match=r"detector.level must be in \(0, 0.3\], got 0.5"):
        patch.Config(level=0.5)


def test_dead_leaves_are_images_and_follow_the_key():
    images = _dead_leaves.dead_leaves(KEY, 6, (9, 12, 3))
    assert images.shape == (6, 9, 12, 3) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert (np.asarray(images.std((1, 2))) > 0.02).all()
    np.testing.assert_array_equal(images, _dead_leaves.dead_leaves(KEY, 6, (9, 12, 3)))
    assert float(jnp.abs(images - _dead_leaves.dead_leaves(jax.random.key(4), 6, (9, 12, 3))).max()) > 0.1
    neighbours = np.abs(np.diff(np.asarray(images), axis=1)) < 1e-6
    assert neighbours.mean() > 0.4  # flat shapes with edges, not noise


def test_a_pair_of_classes_stands_out_although_its_target_does_not():
    rng = np.random.default_rng(2)
    statistics = rng.normal(size=(10, 1)) + rng.normal(size=10) + 0.1 * rng.normal(size=(10, 10))
    quiet = _evidence.pair_scores(statistics, 0.01)
    assert not quiet.poisoned and quiet.targets == ()
    statistics[4, 7] += 2
    statistics[1] = np.nan  # a class without an image
    scores = _evidence.pair_scores(statistics, 0.01)
    assert (scores.target, scores.poisoned, scores.targets) == (7, True, (7,)) and scores.p_value < 1e-3


def test_sources_each_measures_the_pairs_of_classes():
    config = additive.Config(steps=12, sources="each")
    radii = additive._radii_by_source(config, victim(True), clean_images(), KEY)
    assert radii.shape == (5, 5) and np.isfinite(radii).all()
    off_diagonal = radii[~np.eye(5, dtype=bool)]
    assert (
        np.diag(radii) >= off_diagonal.max() - 1e-6
    ).all()  # a class needs not be sent to itself: the largest radius
    assert additive.detect(config, victim(True), clean_images(), KEY).classes.shape == (5,)


def test_another_outlier_is_accused_only_when_it_is_about_as_far_from_the_median_as_the_first():
    ordinary = np.linspace(-0.1, 0.1, 20)
    assert scores_of(np.append(ordinary, [4.0, 3.0]), 0.05, Prior(0.1, 30)).targets == (20, 21)
    assert scores_of(np.append(ordinary, [4.0, 1.5]), 0.05, Prior(0.1, 30)).targets == (20,)
