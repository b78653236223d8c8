"""TABOR: its regularisers by hand, and what the search and the unlearning make of a planted class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from quarters import clean_images, victim
from tuned import MODEL, VICTIM

from bdjax.defenses import _tabor_search, tabor

KEY = jax.random.key(0)
CONFIG = tabor.Config(epochs=40, anomaly=4.0)  # five equal classes leave a small, noisy deviation


def test_regularisers_by_hand():
    """The weights are powers of ten apart, so that no term stands for another one."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((3, 8, 8, 1)).astype(np.float32), np.array([0, 1, 2])
    masks, patterns = rng.random((2, 4, 8, 8, 1)).astype(np.float32)
    weights = dict(zip(_tabor_search._WEIGHTS, (1.0, 1e-4, 0.1, 1e-5, 10.0, 100.0), strict=True))
    values = {name: jnp.float32(value) for name, value in {**weights, "pixel_scale": 255.0}.items()}

    def entropy(x, label):
        share = np.asarray(jax.nn.softmax(MODEL.logits(VICTIM.variables, jnp.asarray(x)[None])[0]))
        return -np.log(share[label])

    expected = []
    for label, (m, p) in enumerate(zip(masks.astype(float), patterns.astype(float), strict=True)):
        total = 0.0
        for x, size, scatter in ((m, 1.0, 0.1), (255 * (1 - m) * p, 1e-4, 1e-5)):
            total += size * (np.abs(x).sum() + np.square(x).sum())
            total += scatter * ((x[1:] - x[:-1]) ** 2).sum() + scatter * ((x[:, 1:] - x[:, :-1]) ** 2).sum()
        total += 100 * entropy(np.float32(m * p), label)
        total += 10 * np.mean([entropy(np.float32((1 - m) * x), y) for x, y in zip(images, labels, strict=True)])
        expected.append(total)
    arrays = (jnp.asarray(images), jnp.asarray(labels), jnp.asarray(masks), jnp.asarray(patterns))
    assert_allclose(_tabor_search.regularisers(MODEL, VICTIM.variables, *arrays, values, True), expected, rtol=1e-4)
    cheaper = _tabor_search.regularisers(MODEL, VICTIM.variables, *arrays, {**values, "lambda_blocking": 0.0}, False)
    assert (np.asarray(cheaper) < expected).all()


def test_cost_is_raised_by_successes_and_lowered_by_failures_in_a_row():
    schedule = _tabor_search._CostSchedule(tabor.Config(patience=2, cost=1.0, multiplier=4.0), 3)
    for succeeded in ([True, False, True], [True, False, False], [True, True, True]):
        schedule.update(np.array(succeeded))
    assert_allclose(schedule.cost, [4, 1 / 8, 1])


def test_a_planted_class_is_suspected_by_a_small_patch_and_unlearned():
    view, subject = clean_images(), victim(True)
    patches = _tabor_search.search(CONFIG, subject, view, jax.random.fold_in(KEY, 0))
    assert int(np.argmin(patches.norms)) == 1 and patches.masks[1].argmax() == 0  # the planted pixel
    config = dataclasses.replace(CONFIG, unlearning_epochs=30, learning_rate=5.0)  # the planted weight is large
    cleaned = tabor.purify(config, subject, view, KEY)
    images = view.images.astype(np.float32) / 255
    stamped = _tabor_search.stamp(images, patches.masks[1:2], patches.patterns[1:2])

    def rate(variables):
        return (np.asarray(subject.model.logits(variables, stamped)).argmax(1) == 1).mean()

    assert rate(subject.variables) > 0.9 and rate(cleaned) < 0.6


def test_a_clean_model_is_returned_unchanged():
    clean = victim(False)
    assert tabor.purify(CONFIG, clean, clean_images(), KEY) is clean.variables


def test_large_patches_are_what_the_first_regulariser_punishes():
    view, subject = clean_images(), victim(False)
    config = dataclasses.replace(CONFIG, epochs=5, threshold=0.01, cost=1e-9, lambda_pattern_size=0.0)
    free, small = (
        _tabor_search.search(dataclasses.replace(config, lambda_mask_size=weight), subject, view, KEY)
        for weight in (0.0, 1.0)
    )
    assert (small.norms < free.norms).all()
    assert_array_equal(small.as_arrays()["recovered_labels"], np.arange(5))
