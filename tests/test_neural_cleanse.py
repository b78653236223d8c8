"""Neural Cleanse: the search for patches, independent between classes; the detection; the unlearning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from quarters import SHAPE, clean_images, victim

from bdjax.defenses import neural_cleanse as nc
from bdjax.detectors import _smallest_patches
from bdjax.detectors import neural_cleanse as detector
from bdjax.errors import InputError

KEY = jax.random.key(0)


@pytest.fixture
def view():
    return clean_images()


CONFIG = nc.Config(epochs=40, anomaly=4.0)  # five equal classes leave a small, noisy deviation


def test_the_patch_of_a_planted_class_is_small_and_is_the_pixel(view):
    scores = detector.detect(CONFIG, victim(True), view, KEY)
    assert (scores.target, scores.poisoned) == (1, True)
    masks = _smallest_patches.search(CONFIG, victim(True), view, jax.random.fold_in(KEY, 0)).masks
    assert masks[1, 0, 0, 0] > 0.1 and masks[1].reshape(-1)[1:].max() < 0.5 * masks[1, 0, 0, 0]
    assert_array_equal(view.callback.arrays["recovered_labels"], np.arange(5))
    assert view.callback.arrays["recovered"].shape == (5, *SHAPE)


def test_a_clean_model_is_not_suspected_and_is_returned_unchanged(view):
    clean = victim(False)
    assert not detector.detect(CONFIG, clean, view, KEY).poisoned
    assert nc.purify(CONFIG, clean, view, KEY) is clean.variables


def test_the_returned_patch_reaches_the_threshold_and_its_norm_is_that_of_its_mask(view):
    subject, config = victim(True), dataclasses.replace(CONFIG, threshold=0.9)
    patches = _smallest_patches.search(config, subject, view, KEY)
    assert_allclose(patches.norms, patches.masks.sum((1, 2, 3)), rtol=1e-5)
    assert (patches.norms < 16).all()
    images = view.images.astype(np.float32) / 255
    for label in range(5):
        stamped = _smallest_patches.stamp(images, patches.masks[label : label + 1], patches.patterns[label : label + 1])
        assert (np.asarray(subject.model.logits(subject.variables, stamped)).argmax(1) == label).mean() >= 0.8


def test_classes_searched_together_are_independent(view):
    """Another start for class 3 leaves the patches of the other classes unchanged."""
    config, subject = dataclasses.replace(CONFIG, epochs=3), victim(True)
    one = _smallest_patches.search(config, subject, view, KEY)
    step = _smallest_patches._step(subject.model)
    state = {"mask": jnp.ones((5, 4, 4, 1)), "pattern": jnp.ones((5, 4, 4, 1))}
    state["mask"] = state["mask"].at[3].set(-2.0)
    other = {"mask": jnp.ones((5, 4, 4, 1)), "pattern": jnp.ones((5, 4, 4, 1))}
    constants = {
        "images": jnp.asarray(view.images), "variables": subject.variables, "rate": jnp.float32(0.1),
        "cost": jnp.full(5, 1e-3, jnp.float32),
    }  # fmt: skip
    index = {"index": jnp.arange(10)}
    updated = [
        step({"latent": start, "opt": _smallest_patches._ADAM.init(start)}, index, {}, constants, None)[0]["latent"]
        for start in (state, other)
    ]
    for name in ("mask", "pattern"):
        keep = np.array([0, 1, 2, 4])
        assert_array_equal(np.asarray(updated[0][name])[keep], np.asarray(updated[1][name])[keep])
    assert np.abs(np.asarray(updated[0]["mask"])[3] - np.asarray(updated[1]["mask"])[3]).min() > 1
    assert one.masks.shape == (5, 4, 4, 1)


def test_the_penalty_follows_success_and_failure(view, monkeypatch):
    """λ doubles after `patience` epochs of success and is divided by 2^1.5 after as many of failure."""
    costs, real = [], _smallest_patches.run_epoch

    def spy(step, state, batch, per_step, constants, tick):
        costs.append(np.array(constants["cost"]))
        state, metrics = real(step, state, batch, per_step, constants, tick=tick)
        rate = np.zeros_like(np.asarray(metrics["rate"]))
        rate[:, 0] = 1.0
        return state, {**metrics, "rate": rate}

    monkeypatch.setattr(_smallest_patches, "run_epoch", spy)
    patches = _smallest_patches.search(nc.Config(epochs=5, patience=2), victim(False), view, KEY)
    assert_allclose(np.array(costs)[:, 0], [1e-3, 1e-3, 2e-3, 2e-3, 4e-3], rtol=1e-5)
    assert_allclose(np.array(costs)[:, 1], 1e-3 / 2 ** np.array([0, 0, 1.5, 1.5, 3]), rtol=1e-5)
    assert (
        patches.norms[0] < 16 and (patches.norms[1:] == 16).all()
    )  # a class that never reached the threshold has the largest norm


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"threshold": 1.5}, r"defense.threshold must be in \(0, 1\], got 1.5"),
        ({"multiplier": 1.0}, r"defense.multiplier must be above 1, got 1.0"),
        ({"patience": 0}, r"defense.patience must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        nc.Config(**changes)


def test_unlearning_reports_the_patches_and_stamps_a_share_of_the_images(view, monkeypatch):
    arguments = {}

    def tune(subject, images, labels, recipe, key, callback, stage, before):
        arguments.update(images=images, labels=labels, recipe=recipe)
        return "tuned"

    monkeypatch.setattr(nc, "tune", tune)
    assert nc.purify(dataclasses.replace(CONFIG, stamped=0.25), victim(True), view, KEY) == "tuned"
    assert_array_equal(view.callback.arrays["suspected"], [1])
    changed = (np.abs(arguments["images"] - view.images.astype(np.float32) / 255) > 1e-6).any((1, 2, 3))
    assert changed.sum() == 20 and (arguments["images"][changed][:, 0, 0, 0] > 0.1).all()
    assert_array_equal(arguments["labels"], view.labels)
