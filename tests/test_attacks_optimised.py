"""The attacks whose trigger or poison is optimised on a model, against closed forms and independent computations."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
from conftest import perceptron, untrained_task

from bdjax import attacks, models, registry
from bdjax.attacks import _activations
from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import Callback, Model, to_float

QUICK = {"iterations": 2, "epochs": 1, "surrogate_epochs": 1, "images": 4}
KEY = jax.random.key(7)


def module_of(name):
    return registry.load_module("attacks", name)


def config_of(name, **fields):
    known = {field.name for field in dataclasses.fields(module_of(name).Config)}
    return module_of(name).Config(**{**{k: v for k, v in QUICK.items() if k in known}, **fields})


def task_of(shape=(32, 32, 3), count=40, classes=4, model=None, **fields):
    """Random images, labels 0, 1, 2, 3, 0 ..., and an untrained model that nothing trains."""
    images = np.random.default_rng(3).integers(0, 256, (count, *shape)).astype(np.uint8)
    labels = np.arange(count, dtype=np.int32) % classes
    return dataclasses.replace(untrained_task(images, labels, model or perceptron(shape, classes)), **fields)


def prepared(name, task, **fields):
    return module_of(name).prepare(config_of(name, **fields), task, KEY)


class Ticks(Callback):
    """Counts the steps of each stage."""

    def __init__(self):
        self.done = {}

    def on_progress(self, stage, done, total):
        self.done[stage] = done


# Patterns that excite neurons: l2_inv, trojan_sq, trojan_wm


@pytest.mark.parametrize(("name", "norm"), [("l2_inv", 3.22), ("trojan_sq", 8.66), ("trojan_wm", 8.74)])
def test_pattern_has_the_papers_norm_and_is_added(name, norm):
    pattern = prepared(name, task_of(), target=2)["pattern"]
    assert np.linalg.norm(pattern) == pytest.approx(norm, rel=1e-5)
    assert pattern.dtype == np.float32 and pattern.min() >= 0 and pattern.max() <= 1
    small = prepared(name, task_of((8, 8, 1)), target=2)["pattern"]
    assert np.linalg.norm(small) == pytest.approx(norm * (64 / 3072) ** 0.5, rel=1e-5)
    images = task_of().images[:5] / np.float32(255)
    out = attacks.trigger_of(name, config_of(name), {"pattern": pattern})(jnp.asarray(images), KEY)
    np.testing.assert_allclose(out, np.clip(images + pattern, 0, 1), atol=1e-6)


def test_l2_pattern_is_what_the_neuron_sees_above_zero():
    """Of all t >= 0 of one norm, w . t is largest at t ~ max(w, 0); the neuron is that of the target's top weight."""
    task = task_of((8, 8, 1), count=80)
    params = task.clean()["params"]
    best = np.maximum(np.asarray(params["body"])[:, int(np.argmax(params["head"]["kernel"][:, 1]))], 0)
    for iterations, least, most in ((1, 0.3, 0.8), (300, 0.999, 1.001)):  # one step is a tenth of the norm
        fields = {"target": 1, "neurons": 1, "iterations": iterations, "gain": 1e3}
        pattern = prepared("l2_inv", task, **fields)["pattern"].ravel()
        assert least < pattern @ best / np.linalg.norm(pattern) / np.linalg.norm(best) < most


@pytest.mark.parametrize("name", ["trojan_sq", "trojan_wm"])
def test_trojans_excite_the_neuron_that_all_classes_hear_best(name):
    """Within a mask w . t is largest at t = min(c max(w, 0), mask); a random pattern has about half of that."""
    task = task_of()
    params = task.clean()["params"]
    config = config_of(name, neurons=1, iterations=200)
    pattern, random = (module_of(name).prepare(c, task, KEY)["pattern"] for c in (config, config_of(name)))
    sees = np.asarray(params["body"])[:, int(np.argmax(np.abs(params["head"]["kernel"]).sum(1)))].reshape(pattern.shape)
    seen, mask = np.maximum(sees, 0), 1.0 * pattern.any(-1, keepdims=True)
    if name == "trojan_sq":
        mask[:, 29], mask[29] = mask[:, 29] / 7, mask[29] / 7
    c = scipy.optimize.brentq(lambda c: np.linalg.norm(np.minimum(c * seen, mask)) - config.norm, 1, 1e4)
    best = (np.minimum(c * seen, mask) * sees).sum()
    assert 0.97 * best < (pattern * sees).sum() < 1.001 * best
    assert (random * sees).sum() < 0.6 * best


def test_a_reachable_activation_is_met():
    """Steps of a given length overshoot, but the last are short: the neuron ends where it shall be."""
    task = task_of((8, 8, 1), count=80)
    clean = _activations.activation(task.model, task.clean(), to_float(task.images))
    neuron = int(np.argmax(task.clean()["params"]["head"]["kernel"][:, 1]))
    pattern = prepared("l2_inv", task, target=1, neurons=1, iterations=300, gain=0.5)["pattern"]
    found = _activations.activation(task.model, task.clean(), jnp.asarray(pattern)[None])[0, neuron]
    assert float(found) == pytest.approx(0.5 * float(jnp.abs(clean[:, neuron]).mean()), rel=0.02)


@pytest.mark.parametrize(
    ("name", "pixels", "most"), [("trojan_sq", 81, 3**0.5 * (8 + 1 / 49)), ("trojan_wm", 321, 963**0.5)]
)
def test_a_mask_filled_to_the_brim_shows_its_pixels(name, pixels, most):
    pattern = prepared(name, task_of(), norm=most * (1 - 1e-5))["pattern"]
    seen = (pattern > 1e-3).any(-1)
    assert seen.sum() == pixels
    rows, columns = np.argwhere(seen).min(0), np.argwhere(seen).max(0)
    first, last = (21, 29) if name == "trojan_sq" else (0, 29)
    np.testing.assert_array_equal([rows, columns], [[first] * 2, [last] * 2])
    if name == "trojan_sq":
        np.testing.assert_allclose(pattern[21:29, 21:29], 1, atol=1e-3)
        np.testing.assert_allclose(pattern[29, 21:29], 1 / 7, atol=1e-3)
    with pytest.raises(InputError, match="attack.norm=.*at most"):
        prepared(name, task_of(), norm=most * 1.001)


def test_a_pattern_is_scaled_down_to_its_norm_or_blended_with_the_mask():
    mask = np.ones(2, np.float32)
    np.testing.assert_allclose(_activations.scale_to_norm(np.float32([0.6, 0.8]), mask, 0.5), [0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(_activations.scale_to_norm(np.float32([0, 1]), mask, 1.25**0.5), [0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(_activations.scale_to_norm(mask, mask, 2**0.5), mask, rtol=1e-6)


def test_dead_and_unreached_neurons_are_not_chosen():
    worth, clean = np.array([5.0, 4, 3, 2, 1]), np.full((10, 5), -1.0)
    clean[:, 1:] = 1
    change = np.array([1, 0.05, -0.5, 1, 1])
    np.testing.assert_array_equal(_activations.strongest_neurons(worth, clean, change, 2), [2, 3])
    np.testing.assert_array_equal(_activations.strongest_neurons(worth, clean, change, 9), [2, 3, 4])
    with pytest.raises(InputError, match="no neuron"):
        _activations.strongest_neurons(worth, clean, 0 * change, 2)


# smooth


def linear(weights, shape):
    """A Model whose logits are images @ weights."""

    def apply(variables, images, train=False, keys=None, axis_name=None):
        flat = images.reshape(len(images), -1)
        return flat @ variables["params"]["head"]["kernel"], {"flat": flat}, {}

    variables = {"params": {"head": {"kernel": jnp.asarray(weights, jnp.float32)}}, "batch_stats": {}}
    return Model("linear", shape, weights.shape[1], lambda key: variables, apply)


def two_classes(shape, seed=0):
    """Labels 0, 1, 0 ... of grey images, all taken for 0 by a linear model of random weights."""
    weights = np.random.default_rng(seed).normal(size=(int(np.prod(shape)), 2))
    weights -= weights.mean(0)  # grey is 0 for both
    weights[0, 0] += 1
    task = task_of(shape, classes=2, model=linear(weights, shape))
    task.images[:] = 128
    return task, (weights[:, 1] - weights[:, 0]).reshape(shape)


def test_smooth_is_the_filtered_way_to_the_target():
    """DeepFool on a linear model is one step along the difference of weights; SciPy filters it twice."""
    task, way = two_classes((32, 32, 1))
    pattern = prepared("smooth", task, target=1, images=1)["pattern"]
    for _ in range(2):
        way = scipy.ndimage.gaussian_filter(way, 6, mode="constant", truncate=2.5, axes=(0, 1))
    np.testing.assert_allclose(pattern, 0.2 * (way - way.min()) / np.ptp(way), atol=1e-5)


def test_smooth_deepfool_goes_just_over_the_boundary():
    task, way = two_classes((8, 8, 1))
    module, image = module_of("smooth"), np.full((8, 8, 1), 0.5, np.float32)
    gap = -0.5 * way.sum()
    found = module._deepfool(config_of("smooth", overshoot=0.5), task.model, task.clean(), image, 0, 1)
    np.testing.assert_allclose(found, 1.5 * (gap / np.linalg.norm(way) + 1e-4) * way / np.linalg.norm(way), rtol=1e-3)
    assert module._deepfool(config_of("smooth"), task.model, task.clean(), image, 1, 1) is None  # it is 0 already


def test_smooth_is_of_low_frequency_and_fills_its_range():
    pattern = prepared("smooth", task_of(), target=2, images=6, peak=0.3)["pattern"]
    assert pattern.min() == 0 and pattern.max() == pytest.approx(0.3)
    energy, index = np.abs(np.fft.fft2(pattern, axes=(0, 1))) ** 2, 32 * np.fft.fftfreq(32)
    energy[0, 0] = 0
    assert energy[np.hypot(index[:, None], index) <= 1.5].sum() > 0.94 * energy.sum()


@pytest.mark.parametrize(("fooled", "passes"), [(0.01, 1), (1.0, 3)])
def test_smooth_ends_when_enough_are_fooled(fooled, passes):
    ticks = Ticks()
    prepared("smooth", task_of((8, 8, 1), callback=ticks), target=2, images=5, epochs=3, fooled=fooled)
    assert ticks.done == {"smooth perturbation": 5 * passes}


def test_smooth_says_when_no_image_reaches_the_target():
    task = task_of((8, 8, 1), model=linear(np.zeros((64, 4)), (8, 8, 1)))
    with pytest.raises(InputError, match="none of 4 images to class 2 within attack.deepfool_steps=200"):
        prepared("smooth", task, target=2)
    with pytest.raises(InputError, match="all training images"):
        prepared("smooth", dataclasses.replace(task, labels=task.labels * 0 + 2), target=2)


# narcissus


def test_narcissus_fills_its_ball_and_is_boosted_at_test_time():
    """The gradient of a linear model of two classes has one direction: every value ends at epsilon with its sign."""
    task, way = two_classes((8, 8, 1))
    noise = prepared("narcissus", task, target=1, epochs=400, epsilon=4.0)["noise"]
    large = np.abs(way) > 0.1
    np.testing.assert_allclose(noise[large], 4 / 255 * np.sign(way)[large], atol=1e-6)
    assert np.abs(noise).max() <= np.float32(4 / 255)
    images, config = to_float(task.images[:2]), config_of("narcissus", boost=2.0)
    for training, strength in ((True, 1), (False, 2)):
        out = attacks.trigger_of("narcissus", config, {"noise": noise}, training)(images, KEY)
        np.testing.assert_allclose(out, np.clip(images + strength * noise, 0, 1), atol=1e-6)


def test_narcissus_on_two_devices_is_narcissus():
    fields = {"target": 1, "epochs": 8}
    one = prepared("narcissus", task_of((8, 8, 1)), **fields)["noise"]
    with parallel.using(2):
        two = prepared("narcissus", task_of((8, 8, 1)), **fields)["noise"]
    np.testing.assert_allclose(two, one, atol=1e-6)
    assert np.abs(one).max() > 1e-3


def recorded(task, calls):
    """The task, whose trainings are noted."""

    def fit(images, labels, key, *, stage="training", start=None, recipe=None, model=task.model):
        calls.append(
            SimpleNamespace(images=images, labels=labels, stage=stage, start=start, recipe=recipe, model=model)
        )
        return model.init(key)

    return dataclasses.replace(task, fit=fit)


def test_narcissus_learns_the_tasks_classes_then_the_target_alone():
    calls, fields = [], {"surrogate_epochs": 7, "surrogate_rate": 0.3, "warmup_epochs": 2, "batch_size": 16}
    task = recorded(task_of((8, 8, 1)), calls)
    prepared("narcissus", task, target=3, **fields)
    first, second = calls
    assert (first.stage, second.stage) == ("surrogate", "warm-up") and first.model is second.model is task.model
    np.testing.assert_array_equal(first.labels, task.labels)
    np.testing.assert_array_equal(second.images, task.images[3::4])
    assert (second.labels == 3).all() and second.start is not None
    assert first.recipe["epochs"] == 7 and first.recipe["learning_rate"] == 0.3 and first.recipe["batch_size"] == 16
    assert second.recipe["epochs"] == 2 and second.recipe["batch_size"] == 10
    calls.clear()
    prepared("narcissus", task, target=3, warmup_epochs=0)
    assert [call.stage for call in calls] == ["surrogate"]


@pytest.mark.slow
def test_narcissus_adds_the_target_to_other_images_as_one_class_more():
    files = {
        "x.npy": np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8),
        "y.npy": np.array([0, 5, 2, 1, 0, 3]),
        "short.npy": np.arange(5),
        "flat.npy": np.zeros((6, 4)),
    }
    calls = []
    task = task_of((8, 8, 1), model=models.create("cnn", (8, 8, 1), 4), read_array=lambda path: files[path])
    task = recorded(task, calls)
    fields = {"surrogate_images": "x.npy", "surrogate_labels": "y.npy"}
    noise = prepared("narcissus", task, target=3, **fields)["noise"]
    assert calls[0].model.classes == 7 and calls[0].images.shape == (16, 8, 8, 1) and noise.shape == (8, 8, 1)
    np.testing.assert_array_equal(calls[0].labels, [0, 5, 2, 1, 0, 3, *[6] * 10])
    np.testing.assert_array_equal(calls[0].images[6:], task.images[3::4])
    assert (calls[1].labels == 6).all()
    for change, words in (
        ({"surrogate_labels": "short.npy"}, "6 whole numbers"),
        ({"surrogate_images": "flat.npy"}, "n, h, w"),
    ):
        with pytest.raises(InputError, match=words):
            prepared("narcissus", task, target=3, **{**fields, **change})
