"""The guard: which images it uses, which round it returns, and what it reports."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quarters import Seen, clean_images, victim

from bdjax.defenses._guard import FEWEST, accuracy, guarded, split_off
from bdjax.types import DefenderView

KEY = jax.random.key(3)


class Rounds(Seen):
    """Stores the reports of all rounds."""

    def __init__(self):
        super().__init__()
        self.rounds = []

    def on_round_end(self, step, variables, **arrays):
        super().on_round_end(step, variables, **arrays)
        self.rounds.append((step, variables, arrays))


def ruined(variables, by=0.0):
    """The victim's parameters times `by`; with zero, all images are assigned to one class."""
    return {**variables, "params": jax.tree.map(lambda p: p * by, variables["params"])}


def defense(*rounds):
    """A method that reports these variables, one per round, and returns the last."""

    def purify(config, artifact, view, key):
        assert view.validation is not None
        for step, variables in enumerate(rounds, 1):
            view.callback.on_round_end(step, variables)
        return rounds[-1]

    return SimpleNamespace(purify=purify)


@pytest.mark.parametrize("good", [0, 1, 2])
def test_the_last_round_with_sufficient_accuracy_is_returned(good):
    artifact, callback = victim(True), Rounds()
    view = split_off(dataclasses.replace(clean_images(), callback=callback), 0.2, KEY)
    fine = [ruined(artifact.variables, 1.0 + 0.001 * step) for step in (1, 2)][:good]
    cleaned = guarded(defense(*fine, ruined(artifact.variables)), None, artifact, view, KEY, 0.1)
    expected = fine[-1] if good else artifact.variables
    jax.tree.map(np.testing.assert_array_equal, cleaned["params"], expected["params"])
    step, reported, arrays = callback.rounds[-1]
    assert step == good + 2 and int(arrays["rolled_back_to"]) == good
    jax.tree.map(np.testing.assert_array_equal, reported["params"], expected["params"])
    accuracies = [float(arrays["validation_accuracy"]) for _, _, arrays in callback.rounds[:-1]]
    assert accuracies[-1] < accuracy(artifact, artifact.variables, view.validation) - 0.1


def test_a_result_with_sufficient_accuracy_is_returned_without_a_report():
    artifact, callback = victim(True), Rounds()
    view = split_off(dataclasses.replace(clean_images(), callback=callback), 0.2, KEY)
    last = ruined(artifact.variables, 1.01)
    assert guarded(defense(ruined(artifact.variables), last), None, artifact, view, KEY, 0.1) is last
    assert not any("rolled_back_to" in arrays for _, _, arrays in callback.rounds)


def test_validation_images_are_not_trained_on():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    view = DefenderView(images, np.tile(np.arange(4, dtype=np.int32), 25), trigger=lambda x, key: x)
    split = split_off(view, 0.2, KEY)
    assert len(split.labels) == 80 and len(split.validation.labels) == 20 and split.trigger is view.trigger
    assert not set(split.images.ravel().tolist()) & set(split.validation.images.ravel().tolist())
    assert np.bincount(split.validation.labels).tolist() == [5] * 4


def test_few_images_are_all_trained_on():
    view = DefenderView(np.zeros((40, 1, 1, 1), np.uint8), np.zeros(40, np.int32))
    assert split_off(view, 0.2, KEY) is view and round(0.2 * 40) < FEWEST
    assert split_off(view, 0.0, KEY) is view

    def purify(config, artifact, view, key):
        return jnp.float32(7)

    assert guarded(SimpleNamespace(purify=purify), None, None, view, KEY, 0.1) == 7
