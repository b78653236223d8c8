"""Activation-guided editing: with and without the trigger, repair, detection, and invalid input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose, assert_array_equal

from bdjax import models, registry
from bdjax.defenses import _activation_edit, age
from bdjax.engine import FitConfig, fit, parallel
from bdjax.engine.clock import compiled_programs
from bdjax.errors import InputError
from bdjax.types import Callback, DefenderView, Victim, to_float

KEY, MODEL = jax.random.key(0), perceptron()


def corner(images, key):
    return images.at[:, -3:, -3:].set(1.0)


class Seen(Callback):
    """Stores the reported variables."""

    def __init__(self):
        self.steps = []

    def on_round_end(self, step, variables, **arrays):
        self.steps.append((step, jax.tree.map(np.array, variables)))


@pytest.fixture(scope="module")
def backdoored(blobs):
    """Learns that a white corner means 2."""
    images, labels = blobs[0].copy(), blobs[1].copy()
    images[:80, -3:, -3:], labels[:80] = 255, 2
    return Victim(MODEL, fit(MODEL, images, labels, FitConfig(30, 40, learning_rate=1e-2), KEY))


def test_knowledge_of_the_trigger_removes_it_and_its_class_and_repair_brings_the_class_back(backdoored, blobs):
    images, others = jnp.asarray(blobs[0], jnp.float32) / 255, blobs[1] != 2

    def rates(variables):
        clean = MODEL.logits(variables, images).argmax(-1)
        stamped = MODEL.logits(variables, corner(images, KEY)).argmax(-1)
        return float((stamped == 2)[others].mean()), float((clean == blobs[1])[~others].mean())

    assert rates(backdoored.variables)[0] > 0.8 and rates(backdoored.variables)[1] > 0.9
    view = DefenderView(*blobs, trigger=corner)
    config = age.Config(backdoor_knowledge=True, scale=1.0)  # 4 classes score -sqrt(3) where 10 score -3
    asr, ctca = rates(age.purify(config, backdoored, view, KEY))
    assert asr < 0.05 and ctca < 0.2
    config = dataclasses.replace(config, repair=True, epochs=20, batch_size=20, learning_rate=0.05)
    asr, ctca = rates(age.purify(config, backdoored, view, KEY))
    assert asr < 0.2 and ctca > 0.8


@pytest.mark.parametrize(("knows", "stages"), [(False, 1), (True, 2)])
def test_the_edit_and_each_epoch_of_repair_are_reported(backdoored, blobs, knows, stages):
    callback = Seen()
    view = DefenderView(blobs[0][:40], blobs[1][:40], callback, corner)
    config = age.Config(backdoor_knowledge=knows, repair=True, epochs=2, share_of="layers", batch_norm=None)
    cleaned = age.purify(config, backdoored, view, KEY)
    assert [step for step, _ in callback.steps] == list(range(1, 2 + 2 * stages))
    base = age.purify(dataclasses.replace(config, repair=False), backdoored, view, KEY)
    jax.tree.map(assert_array_equal, callback.steps[0][1], base)
    jax.tree.map(assert_array_equal, callback.steps[2 * stages][1], cleaned)
    assert (np.asarray(base["params"]["body"]) == backdoored.variables["params"]["body"]).all()  # the first half


@pytest.mark.slow
@pytest.mark.parametrize(("number", "batch"), [(40, 40), (40, 20), (4, 128)])
def test_statistics_are_reestimated_on_the_clean_images(number, batch):
    """The weight of the batch mean is images / (images + 32), independent of the momentum of the running mean."""
    model = models.create("cnn", (8, 8, 1), 4)
    victim = Victim(model, model.init(KEY))
    images = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 1)).astype(np.uint8)
    view = DefenderView(images, np.zeros(number, np.int32), trigger=corner)
    config = age.Config(backdoor_knowledge=True, batch_size=batch)
    frozen = age.purify(dataclasses.replace(config, batch_norm="frozen"), victim, view, KEY)
    purified = age.purify(config, victim, view, KEY)
    jax.tree.map(assert_array_equal, purified["params"], frozen["params"])
    parts = to_float(images).reshape(-1, min(batch, number), 8, 8, 1)
    limits = []
    for part in parts:  # the running average of one repeated batch converges to the batch mean
        current = frozen
        for _ in range(150):
            current = {**current, "batch_stats": model.apply(current, part, True)[2]}
        limits.append(current["batch_stats"])
    if len(parts) > 1:
        assert number == 2 * batch  # the batches are in file order
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *limits)
    weight = number / (number + 32)
    expected = jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, frozen["batch_stats"], mean)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-5), purified["batch_stats"], expected)


def test_only_knowledge_gets_the_trigger():
    for knows in (False, True):
        assert registry.load("defenses", "age").needs_trigger(age.Config(backdoor_knowledge=knows)) is knows


def test_the_trigger_is_not_used_without_knowledge(backdoored, blobs):
    def refuse(images, key):
        raise AssertionError

    view = DefenderView(*blobs, trigger=refuse)
    age.purify(age.Config(), backdoored, view, KEY)
    age.detect(age.Config(backdoor_knowledge=True), backdoored, view, KEY)


def test_other_values_and_keys_compile_nothing(backdoored, blobs):
    def once(seed, **changes):
        view = DefenderView(blobs[0][:64], blobs[1][:64])
        config = age.Config(**changes)
        age.purify(config, backdoored, view, jax.random.key(seed))
        age.detect(config, backdoored, view, jax.random.key(seed))

    once(0)
    before = compiled_programs()
    once(1, scale=0.3, shift=1.2, epsilon=1e-3, threshold=2.0, collapse=0.9)
    assert compiled_programs() == before


def test_four_devices_agree_with_one(backdoored, blobs):
    def run(devices):
        with parallel.using(devices):
            config = age.Config(backdoor_knowledge=True, repair=True)
            return age.purify(config, backdoored, DefenderView(*blobs, trigger=corner), KEY)

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), run(1), run(4))


# --- detection


@pytest.mark.parametrize(
    ("after", "target", "score", "poisoned"),
    [
        # class 1 is forgotten: drops 0, 1, .2, .1, -.1 have median .1 and deviations .1, .9, .1, 0, .2
        ([4, 0, 8, 9, 6], 1, 0.9 / (1.4826 * 0.1), True),
        # class 3 falls to .6: an outlier among equals (mean deviation .4 / 5), but more than half is left
        ([4, 10, 10, 6, 5], 3, 0.4 / (1.2533 * 0.08), False),
        # all fall by about .2: .2, .2, .3, .1, .2
        ([2, 8, 7, 9, 3], 2, 0.1 / (1.2533 * 0.04), False),
    ],
)
def test_detection_equals_a_plain_computation(monkeypatch, after, target, score, poisoned):
    """5 classes of 10 images, of which the model predicts 4, 10, 10, 10 and 5 correctly before the edit."""
    labels = np.repeat(np.arange(5, dtype=np.int32), 10)

    victim = Victim(perceptron(classes=5), perceptron(classes=5).init(KEY))

    def predict(model, variables, images):
        right = [4, 10, 10, 10, 5] if variables is victim.variables else after
        return np.array([c if i < n else (c + 1) % 5 for c, n in enumerate(right) for i in range(10)], np.int32)

    monkeypatch.setattr(_activation_edit, "predict", predict)
    view = DefenderView(np.zeros((50, 8, 8, 1), np.uint8), labels)
    scores = age.detect(age.Config(), victim, view, KEY)
    assert (scores.target, scores.poisoned) == (target, poisoned)
    assert scores.score == pytest.approx(score, rel=1e-4) == scores.classes[target]
    assert not age.detect(age.Config(threshold=1e9), victim, view, KEY).poisoned


def test_detection_is_of_the_edit_without_knowledge(backdoored, blobs, monkeypatch):
    moved, real = [], _activation_edit._editor

    def spy(model, static):
        moved.append(static.updated)
        return real(model, static)

    monkeypatch.setattr(_activation_edit, "_editor", spy)
    age.detect(age.Config(backdoor_knowledge=True), backdoored, DefenderView(*blobs), KEY)
    age.purify(age.Config(backdoor_knowledge=True), backdoored, DefenderView(*blobs, trigger=corner), KEY)
    assert moved == [True, False]


def test_a_class_without_images_is_not_judged(backdoored, blobs):
    others = blobs[1] != 3
    scores = age.detect(age.Config(), backdoored, DefenderView(blobs[0][others], blobs[1][others]), KEY)
    assert np.isnan(scores.classes[3]) and np.isfinite(scores.classes[:3]).all() and scores.target != 3


# --- refusals


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("share", 0.0, r"in \(0, 1\]"), ("share", 1.1, r"in \(0, 1\]"), ("batch_size", 0, "at least 1"),
        ("epochs", 0, "at least 1"), ("scale", 0.0, "positive"), ("epsilon", -1.0, "positive"),
        ("learning_rate", 0.0, "positive"), ("momentum", 1.0, r"in \[0, 1\)"), ("collapse", 0.0, r"in \(0, 1\]"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value, what):
    with pytest.raises(InputError, match=f"defense.{name} must be {what}, got {value}"):
        age.Config(**{name: value})


def test_knowledge_without_a_trigger_is_refused(backdoored, blobs):
    with pytest.raises(InputError, match="age with backdoor_knowledge needs the true trigger"):
        age.purify(age.Config(backdoor_knowledge=True), backdoored, DefenderView(*blobs), KEY)


def test_a_model_that_does_not_tell_is_refused(backdoored, blobs):
    mute = dataclasses.replace(MODEL, outputs=None)
    with pytest.raises(InputError, match="'perceptron' does not provide the outputs of its layers"):
        age.purify(age.Config(), Victim(mute, backdoored.variables), DefenderView(*blobs), KEY)
