"""The hidden trigger, against independent computations; and what all optimised attacks refuse, store and plant."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron, untrained_task

from bdjax import attacks, registry
from bdjax.attacks import _activations
from bdjax.config import from_json, to_json
from bdjax.engine import FitConfig, fit
from bdjax.errors import InputError
from bdjax.types import Callback, Task, to_float

NAMES = ("hidden_trigger", "l2_inv", "narcissus", "smooth", "trojan_sq", "trojan_wm")
QUICK = {"iterations": 2, "epochs": 1, "surrogate_epochs": 1, "images": 4}
KEY = jax.random.key(7)
hidden = registry.load_module("attacks", "hidden_trigger")


def config_of(name, **fields):
    kind = registry.load_module("attacks", name).Config
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{**{k: v for k, v in QUICK.items() if k in known}, **fields})


def hidden_config(**fields):
    given = {"target": 1, "source": 2, "ratio": 0.1, "candidates": 1.5, "iterations": 30, "size": 3, **fields}
    return config_of("hidden_trigger", **given)


def task_of(shape=(8, 8, 1), count=40, **fields):
    images = np.random.default_rng(3).integers(0, 256, (count, *shape)).astype(np.uint8)
    labels = np.arange(count, dtype=np.int32) % 4
    return dataclasses.replace(untrained_task(images, labels, perceptron(shape, 4)), **fields)


def ticks(task):
    """What the task's watch is told, as it comes, and the task."""
    done = []

    class Count(Callback):
        def on_progress(self, *what):
            done.append(what)

    return done, dataclasses.replace(task, callback=Count())


def features(task, images):
    return np.asarray(_activations.activation(task.model, task.clean(), to_float(images)))


def test_pairs_are_the_nearest_then_the_nearest_of_the_rest():
    a, b = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32)
    far = ((a[:, None] - b) ** 2).sum(-1)
    np.testing.assert_allclose(_activations.squared_distances(jnp.asarray(a), jnp.asarray(b)), far, rtol=1e-4)
    expected, left = np.zeros(9, int), far.copy()
    for _ in range(9):
        row, column = np.unravel_index(left.argmin(), left.shape)
        expected[row] = column
        left[row], left[:, column] = np.inf, np.inf
    np.testing.assert_array_equal(_activations.nearest_pairs(jnp.asarray(far)), expected)
    assert sorted(expected) == list(range(9)) and (expected != far.argmin(1)).any()


@pytest.mark.parametrize("epsilon", [4.0, 60.0])
def test_poison_stays_in_its_ball_and_nears_the_patched_source(epsilon):
    """One candidate, and a patch that covers the source image: the distance is known, and must fall."""
    task = task_of()
    config = hidden_config(ratio=0.025, candidates=1.0, epsilon=epsilon, size=8, iterations=200, stop=0.0)
    arrays = hidden.prepare(config, task, KEY)
    assert len(arrays["indices"]) == 1 and arrays["images"].dtype == np.uint8
    before, after = task.images[arrays["indices"]], arrays["images"]
    change = np.abs(after.astype(int) - before).max()
    assert change == epsilon
    aim = features(task, arrays["patch"][None])  # it covers the image
    first, last = (((features(task, images) - aim) ** 2).sum() for images in (before, after))
    assert last < (0.05 if epsilon == 60 else 0.9) * first


def test_of_the_candidates_the_nearest_are_kept_and_put_where_they_stood():
    task = task_of()
    loose = {"iterations": 40, "stop": 0.0, "batch_size": 4, "epsilon": 30.0, "size": 8}
    everything = hidden.prepare(hidden_config(ratio=0.25, **loose), task, KEY)  # all ten of the class
    some = hidden.prepare(hidden_config(ratio=0.1, candidates=2.5, **loose), task, KEY)
    np.testing.assert_array_equal(everything["indices"], np.flatnonzero(task.labels == 1))
    rows = np.searchsorted(everything["indices"], some["indices"])
    np.testing.assert_array_equal(some["images"], everything["images"][rows])
    far = ((features(task, everything["images"]) - features(task, some["patch"][None])) ** 2).sum(1)
    np.testing.assert_array_equal(rows, np.sort(np.argsort(far)[:4]))
    made = hidden.poison(hidden_config(), task, KEY, some)
    assert (made.labels == 1).all() and made.indices.dtype == np.int32
    images, labels = attacks.poisoned_set(made, task.images, task.labels)
    np.testing.assert_array_equal(images[made.indices], some["images"])
    np.testing.assert_array_equal(labels, task.labels)


def test_a_step_that_leads_away_is_not_taken():
    """With a rate that is far too large the distance falls all the same, and in the end no image moves."""
    done, task = ticks(task_of())
    config = hidden_config(learning_rate=1e3, iterations=300, stop=0.0, epsilon=255.0)
    arrays = hidden.prepare(config, task, KEY)
    assert len(done) < 300
    before, after = features(task, task.images[arrays["indices"]]), features(task, arrays["images"])
    source = features(task, task.images[task.labels == 2])
    near = [np.mean(((found[:, None] - source) ** 2).sum(-1).min(1)) for found in (before, after)]
    assert near[1] < 0.5 * near[0]


def test_it_stops_when_all_pairs_are_near():
    done, task = ticks(task_of())
    hidden.prepare(hidden_config(stop=1e6), task, KEY)
    assert done == [("hidden poison", 1, 30)]


def test_patch_of_four_by_four_colours_stands_whole_at_a_random_place():
    task = task_of((32, 32, 3))
    arrays = hidden.prepare(hidden_config(size=None), task, KEY)
    patch = arrays["patch"]
    assert patch.shape == (8, 8, 3) and patch.std() > 0.1
    for side in (patch, patch.swapaxes(0, 1)):  # a quarter and three quarters of the way to the next colour
        np.testing.assert_allclose(side[2] - side[1], 2 * (side[1] - side[0]), atol=1e-6)
    out = np.asarray(hidden.trigger(hidden_config(), jnp.full((30, 32, 32, 3), -1.0), KEY, arrays))
    places = set()
    for image in out:
        seen = np.argwhere((image != -1).any(-1))
        (top, left), (bottom, right) = seen.min(0), seen.max(0)
        assert (bottom - top, right - left) == (7, 7)
        np.testing.assert_array_equal(image[top : bottom + 1, left : right + 1], patch)
        places.add((top, left))
    assert len(places) > 20


def test_only_images_of_the_source_class_count():
    labels = np.array([0, 1, 2, 2, 3], np.int32)
    wanted, eligible = attacks.goal(hidden_config(), labels, 4)
    assert (wanted == 1).all()
    np.testing.assert_array_equal(eligible, labels == 2)
    _, eligible = attacks.goal(attacks.PoisonConfig(target=1), labels, 4)
    np.testing.assert_array_equal(eligible, labels != 1)


@pytest.mark.parametrize("start", ["clean", "scratch"])
@pytest.mark.parametrize("train_on", ["all", "poison"])
def test_the_victim_is_tuned_from_the_clean_model_or_trained_anew(start, train_on):
    calls, base = [], task_of()

    def trained(images, labels, key, **options):
        calls.append((images, labels, options))
        return base.model.init(key)

    task = dataclasses.replace(base, fit=trained)
    config = hidden_config(start=start, train_on=train_on, epochs=3, tuning_rate=0.5)
    planted = attacks.plant("hidden_trigger", config, task, KEY)
    ((images, labels, options),) = calls
    if train_on == "all":
        assert len(images) == 40 and (images[planted.poison.indices] == planted.poison.images).all()
    else:
        np.testing.assert_array_equal(images, planted.poison.images)
        assert (labels == 1).all() and len(labels) == 4
    if start == "clean":
        jax.tree.map(np.testing.assert_array_equal, options["start"], task.clean())
        assert options["recipe"]["epochs"] == 3 and options["recipe"]["learning_rate"] == 0.5
    else:
        assert options == {}
    again = attacks.poison(
        "hidden_trigger", config, Task(task.images, task.labels, task.model, None), KEY, planted.arrays
    )
    np.testing.assert_array_equal(again.images, planted.poison.images)
    np.testing.assert_array_equal(again.indices, planted.poison.indices)


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_config_comes_back_from_json(name):
    config = config_of(name)
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("l2_inv", {"norm": 0.0}, "attack.norm must be positive and finite, got 0.0"),
        ("l2_inv", {"gain": -1.0}, "attack.gain must be positive.*-1.0. Use 10"),
        ("l2_inv", {"step": np.inf}, "attack.step must be positive and finite, got inf"),
        ("l2_inv", {"neurons": 0}, "attack.neurons must be finite and at least 1, got 0"),
        ("trojan_sq", {"iterations": 0}, "attack.iterations .*at least 1, got 0"),
        ("trojan_wm", {"activation": 0.0}, "attack.activation must be positive.*Use 100"),
        ("smooth", {"peak": 1.5}, r"attack.peak must be in \(0, 1\], got 1.5"),
        ("smooth", {"fooled": 0.0}, r"attack.fooled must be in \(0, 1\], got 0.0"),
        ("smooth", {"sigma": 0.0}, "attack.sigma must be positive"),
        ("smooth", {"overshoot": -0.1}, "attack.overshoot .*at least 0, got -0.1"),
        ("smooth", {"images": 0}, "attack.images .*got 0"),
        ("narcissus", {"epsilon": 0.0}, r"attack.epsilon must be in \(0, 255\], got 0.0. Use 16"),
        ("narcissus", {"boost": 0.5}, "attack.boost .*at least 1, got 0.5"),
        ("narcissus", {"warmup_epochs": -1}, "attack.warmup_epochs .*at least 0"),
        ("narcissus", {"surrogate_images": "x.npy"}, "belong together"),
        ("hidden_trigger", {"epsilon": 256.0}, r"\(0, 255\], got 256.0"),
        ("hidden_trigger", {"labels": "all_to_one"}, "attack.labels must be clean.*all_to_one"),
        ("hidden_trigger", {"source": 8}, "attack.source must be a label other than attack.target=8, got 8"),
        ("hidden_trigger", {"decay": 0.0}, r"attack.decay must be in \(0, 1\]"),
        ("hidden_trigger", {"candidates": 0.5}, "attack.candidates .*0.5"),
        ("hidden_trigger", {"size": 0}, "attack.size .*got 0"),
    ],
)
def test_bad_fields_are_refused(name, fields, words):
    with pytest.raises(InputError, match=words):
        config_of(name, **fields)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("narcissus", {"target": 1, "ratio": 0.3}, "a clean-label attack poisons only class 1, which has 10.*0.25"),
        ("hidden_trigger", {"target": 1, "source": 2, "ratio": 0.3}, "poisons only class 1, which has 10.*0.25"),
        ("hidden_trigger", {"target": 1, "source": 4}, "attack.source=4, but the labels go from 0 to 3"),
        ("hidden_trigger", {"target": 1, "source": 2, "ratio": 0.1, "size": 9}, "attack.size=9 does not fit"),
        ("hidden_trigger", {"target": 1, "source": 2, "ratio": 0.1, "layer": "x"}, "attack.layer='x'.*flat"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(name, fields, words):
    with pytest.raises(InputError, match=words):
        attacks.plant(name, config_of(name, **fields), task_of(), KEY)


def test_a_ratio_is_refused_before_a_surrogate_is_trained(monkeypatch):
    config = config_of("narcissus", target=1, ratio=0.3)
    module = registry.load_module("attacks", "narcissus")
    monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("it was prepared"))
    with pytest.raises(InputError, match="The largest ratio here is 0.25"):
        attacks.plant("narcissus", config, task_of(), KEY)


@pytest.mark.parametrize("name", ["narcissus", "hidden_trigger"])
def test_an_empty_class_is_named(name):
    task, fields = task_of(), {"target": 1, "ratio": 0.1}
    gone = 1
    if name == "hidden_trigger":
        fields, gone = {**fields, "source": 2}, 2
    task = dataclasses.replace(task, labels=np.where(task.labels == gone, 0, task.labels))
    with pytest.raises(InputError, match="no image of that class|has 0 images of that class"):
        registry.load_module("attacks", name).prepare(config_of(name, **fields), task, KEY)


@pytest.mark.parametrize("name", NAMES)
def test_plants_end_to_end(name, blobs):
    """A real recipe on a small set: the victim learns it, and what is stored makes the poison again."""
    model, recipe = perceptron((8, 8, 1), 4), FitConfig(epochs=2, batch_size=10, learning_rate=0.01)

    def train(images, labels, key, *, stage="training", start=None, recipe=recipe, model=model):
        changed = recipe if isinstance(recipe, FitConfig) else dataclasses.replace(FitConfig(batch_size=10), **recipe)
        return fit(model, images, labels, changed, key, start=start, stage=stage)

    clean = train(*blobs, jax.random.key(1))
    task = Task(*blobs, model, None, fit=train, clean=lambda: clean)
    fields = {"hidden_trigger": {"source": 1}, "narcissus": {"epochs": 30}}.get(name, {})
    config = config_of(name, target=2, ratio=0.2, **fields)
    planted = attacks.plant(name, config, task, KEY)
    assert jax.tree.structure(planted.variables) == jax.tree.structure(clean) and planted.attack == name
    made = attacks.poison(name, config, Task(*blobs, model, None), KEY, planted.arrays)
    np.testing.assert_array_equal(made.images, planted.poison.images)
    assert len(made.indices) == 40 and (made.labels == 2).all()
    assert (blobs[1][made.indices] == 2).all() == (config.labels == "clean")
    assert (made.images != blobs[0][made.indices]).any(axis=(1, 2, 3)).mean() > 0.9
