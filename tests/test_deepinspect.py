"""DeepInspect: its loss by hand, and what it recovers, suspects and unlearns in a planted and in a clean model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from quarters import clean_images, victim
from tuned import KEY, MODEL, VICTIM

from bdjax.defenses import deepinspect

CONFIG = deepinspect.Config(iterations=200, hidden=16, noise_size=8, gamma=0.2, anomaly=4.0)


def test_loss_of_a_class_by_hand():
    rng = np.random.default_rng(0)
    images, deltas = rng.random((3, 8, 8, 1)).astype(np.float32), rng.random((4, 8, 8, 1)).astype(np.float32)
    losses = deepinspect.class_losses(MODEL, VICTIM.variables, jnp.asarray(images), jnp.asarray(deltas), 0.5)
    expected = []
    for label, delta in enumerate(deltas):
        shares = jax.nn.softmax(MODEL.logits(VICTIM.variables, jnp.asarray(np.clip(images + delta, 0, 1))))
        expected.append(-np.log(np.asarray(shares)[:, label]).mean() + 0.5 * delta.sum())
    assert_allclose(losses, expected, rtol=1e-5)


def test_the_planted_class_has_the_smallest_loss_and_the_planted_pixel_and_is_unlearned(monkeypatch):
    view, subject = clean_images(), victim(True)
    deltas, losses = deepinspect.recover(CONFIG, subject, view, jax.random.fold_in(KEY, 0))
    assert np.argmin(losses) == 1 and deltas[1].argmax() == 0
    assert deltas.shape == (5, 4, 4, 1) and deltas.min() >= 0 and deltas.max() <= 1

    def tune(subject, images, labels, recipe, *_, **__):
        changed = (np.abs(images - view.images / np.float32(255)) > 1e-6).any(axis=(1, 2, 3))
        assert changed.sum() == 20 and (labels == view.labels).all() and recipe.epochs == CONFIG.unlearning_epochs
        assert_allclose(images[changed], np.clip(view.images[changed] / np.float32(255) + deltas[1], 0, 1), atol=1e-6)
        return "tuned"

    monkeypatch.setattr("bdjax.defenses._patch_unlearning.tune", tune)
    config = deepinspect.Config(**{**vars(CONFIG), "stamped": 0.25})
    assert deepinspect.purify(config, subject, view, KEY) == "tuned"
    assert list(view.callback.arrays["suspected"]) == [1]


def test_a_clean_model_is_returned_unchanged():
    clean = victim(False)
    assert deepinspect.purify(CONFIG, clean, clean_images(), KEY) is clean.variables


def test_noise_has_four_equal_parts():
    with pytest.raises(ValueError, match="noise_size"):
        deepinspect.Config(noise_size=6)
