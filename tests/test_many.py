"""Several runs together give what each gives alone, by whatever way, for `fit` and for a defense."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import perceptron

from bdjax.defenses import ibau
from bdjax.engine import FitConfig, fit, many, parallel
from bdjax.engine.clock import compiled_programs
from bdjax.errors import InputError
from bdjax.types import Callback, DefenderView, Victim

MODEL = perceptron()
WAYS = ["vmap", "devices"]


def trainings(blobs, rates=(0.1, 0.05, 0.2), epochs=2):
    """Runs that differ in seed, learning rate and, as a poison ratio would make them, in their images."""
    images, labels = blobs
    recipes = [FitConfig(epochs, 40, "sgd", learning_rate=rate) for rate in rates]
    return [
        partial(fit, MODEL, np.roll(images, i, 0), np.roll(labels, i), recipe, jax.random.key(i))
        for i, recipe in enumerate(recipes)
    ]


def assert_close(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("how", WAYS)
def test_trainings_together_are_the_trainings_alone(how, blobs):
    """Three runs on two devices: the last has a program of its own."""
    alone = [run() for run in trainings(blobs)]
    with parallel.using(2):
        found = many.run_together(trainings(blobs), how)
    assert_close(found, alone)
    assert not np.allclose(found[0]["params"]["body"], found[1]["params"]["body"])


@pytest.mark.parametrize("how", WAYS)
def test_purifications_together(how, blobs):
    images, labels = blobs[0][:30], blobs[1][:30]
    victim = Victim(MODEL, MODEL.init(jax.random.key(9)))

    def purification(rate, seed):
        config = ibau.Config(schedule="release", rounds=2, batch_size=10, outer_lr=rate)
        return lambda: ibau.purify(config, victim, DefenderView(images, labels), jax.random.key(seed))

    runs = [purification(1e-3, 0), purification(3e-3, 1)]
    alone = [run() for run in runs]
    with parallel.using(2):
        assert_close(many.run_together(runs, how), alone)


def test_an_epoch_of_all_is_one_program_and_other_values_compile_nothing(blobs):
    many.run_together(trainings(blobs), "vmap")
    before = compiled_programs()
    many.run_together(trainings(blobs, (0.3, 0.01, 0.07)), "vmap")
    assert compiled_programs() == before


def test_what_all_runs_share_is_not_copied(blobs, monkeypatch):
    images, labels, seen = jax.numpy.asarray(blobs[0]), jax.numpy.asarray(blobs[1]), []
    monkeypatch.setattr(many, "run_epoch", lambda *a, **k: (seen.append(a[4]), many_run_epoch(*a, **k))[1])
    runs = [partial(fit, MODEL, images, labels, FitConfig(1, 40), jax.random.key(i)) for i in range(2)]
    many.run_together(runs, "vmap")
    assert any(leaf is images for leaf in seen[0]["common"])
    assert all(leaf.shape != (2, *images.shape) for leaf in seen[0]["stacked"])


many_run_epoch = many.run_epoch


def test_a_run_that_ends_sooner_is_not_waited_for(blobs):
    runs = [*trainings(blobs)[:2], *trainings(blobs, epochs=1)[2:]]
    assert_close(many.run_together(runs, "vmap"), [run() for run in runs])


def test_every_run_is_told_of_its_steps(blobs):
    class Seen(Callback):
        def __init__(self):
            self.ticks = []

        def on_progress(self, stage, done, total):
            self.ticks.append((done, total))

    watches = [Seen(), Seen()]
    many.run_together(
        [partial(run, callback=callback) for run, callback in zip(trainings(blobs), watches, strict=False)], "vmap"
    )
    assert watches[0].ticks == watches[1].ticks == [(done, 10) for done in range(1, 11)]


def test_the_error_of_one_run_ends_all(blobs):
    with pytest.raises(InputError, match="loss became (nan|inf) .* learning rate 1e\\+30"):
        many.run_together(trainings(blobs, (0.1, 1e30, 0.1)), "vmap")


@pytest.mark.parametrize(
    ("other", "words"),
    [({"optimizer": "adam"}, "share a compiled step"), ({"batch_size": 50}, "shapes of their arrays")],
)
def test_runs_of_different_programs_are_refused(other, words, blobs):
    recipes = [FitConfig(**{"epochs": 1, "batch_size": 40, "optimizer": "sgd", **given}) for given in ({}, other)]
    runs = [partial(fit, MODEL, *blobs, recipe, jax.random.key(0)) for recipe in recipes]
    with pytest.raises(InputError, match=f"{words}.*how='loop'"):
        many.run_together(runs, "vmap")
    assert len(many.run_together(runs, "loop")) == 2


def test_the_way_is_one_of_four_and_a_loop_on_a_cpu(blobs, monkeypatch):
    with pytest.raises(InputError, match="how must be auto, loop, vmap or devices, got 'pmap'"):
        many.run_together([], "pmap")
    monkeypatch.setattr(many, "_Scheduler", None)
    with parallel.using(2):
        assert len(many.run_together(trainings(blobs)[:1] + [lambda: None])) == 2
