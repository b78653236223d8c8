"""`fit`, `run_epoch` and `predict` give the same numbers however they are carried out, and say what cannot work."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import models
from bdjax.engine import FitConfig, fit, parallel, predict, run_epoch
from bdjax.engine.clock import compiled_programs
from bdjax.engine.optimizer import learning_rates
from bdjax.engine.step import draw
from bdjax.errors import InputError
from bdjax.metrics import accuracy
from bdjax.models import _layers
from bdjax.types import Callback, Model

KEY = jax.random.key(0)


def cnn(dtype=jnp.float32):
    return models.create("cnn", (8, 8, 1), 4, dtype)


def _linear(variables, images, train=False, keys=None, axis_name=None):
    flat = images.reshape(len(images), -1)
    return flat @ variables["params"]["w"] + variables["params"]["b"], {"flat": flat}, variables["batch_stats"]


LINEAR = Model(
    "linear",
    (8, 8, 1),
    4,
    lambda key: {"params": {"w": 0.1 * jax.random.normal(key, (64, 4)), "b": jnp.zeros(4)}, "batch_stats": {}},
    _linear,
)
"""Softmax regression: compiles at once and has a gradient that fits in a line."""


class Block(nn.Module):
    """A small_vgg of one block: a biased convolution, BatchNorm, pooling, dropout."""

    classes: int = 4
    axis_name: Any = None

    @nn.compact
    def __call__(self, x, train=False, keys=None):
        x = _layers.norm(train, jnp.float32, self.axis_name)(_layers.conv(8, jnp.float32, bias=True)(x))
        x = _layers.dropout(_layers.max_pool(nn.elu(x)), 0.4, keys if train else None, 1)
        return _layers.head(x.reshape(len(x), -1), self.classes), {}


BLOCK = Model("block", (8, 8, 1), 4, partial(models._init, Block(), (8, 8, 1)), partial(models._apply, Block(), None))


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Seen(Callback):
    """Records its calls."""

    def __init__(self):
        self.ticks, self.steps, self.arrays = [], [], []

    def on_progress(self, stage, done, total):
        self.ticks.append((stage, done, total))

    def on_round_end(self, step, variables, **arrays):
        self.steps.append(step)
        self.arrays.append({name: float(value) for name, value in arrays.items()})


class Memory:
    """A saver that keeps a copy in memory and dies after `lives` epochs."""

    def __init__(self, lives):
        self.lives, self.kept = lives, None

    def save(self, epoch, state):
        self.kept = epoch, jax.tree.map(np.array, state)
        self.lives -= 1
        if self.lives == 0:
            raise KeyboardInterrupt

    def restore(self, like):
        assert self.kept is None or jax.tree.structure(like) == jax.tree.structure(self.kept[1])
        return self.kept


# --- the same numbers

SGD = FitConfig(epochs=2, batch_size=60, optimizer="sgd", learning_rate=0.02, augment="crop_flip")
"""Not Adam, which blows up the rounding noise in gradients that are zero: of biases before a BatchNorm."""


@pytest.fixture(scope="module")
def trained(blobs):
    """The variables that a loop on one device ends with."""
    with parallel.using(1):
        return fit(BLOCK, *blobs, SGD, KEY, mode="loop")


@pytest.mark.parametrize(("devices", "form", "mode"), [(1, "pmap", "scan"), (4, "pmap", "loop"), (4, "jit", "loop")])
def test_every_form_trains_the_same_model(devices, form, mode, blobs, trained):
    with parallel.using(devices, form):
        assert_close(fit(BLOCK, *blobs, SGD, KEY, mode=mode), trained)


def test_a_killed_training_goes_on_to_the_very_same_bits(blobs, trained):
    saver, seen = Memory(lives=1), Seen()
    with pytest.raises(KeyboardInterrupt):
        fit(BLOCK, *blobs, SGD, KEY, saver=saver, mode="loop")
    assert saver.kept[0] == 1
    assert_same(fit(BLOCK, *blobs, SGD, KEY, saver=saver, callback=seen, mode="loop"), trained)
    assert seen.steps == [2] and seen.ticks[0] == ("training", 4, 6)


def toy_step(state, split, whole, shared, axis):
    mean = parallel.average(jnp.mean(split["x"] * state["w"]), axis)
    total = parallel.total(jnp.sum(split["x"]), axis)
    return {"w": state["w"] - whole["rate"] * mean * shared}, {"mean": mean, "total": total}


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize(("devices", "form"), [(1, "pmap"), (4, "pmap"), (4, "jit"), (2, "pmap")])
def test_an_epoch_is_the_same_in_every_form(mode, devices, form):
    x, rate, ticks = np.arange(24, dtype=np.float32).reshape(3, 8), np.float32([0.1, 0.2, 0.3]), []
    with parallel.using(devices, form):
        assert parallel.count() == devices
        state, metrics = run_epoch(
            toy_step,
            {"w": jnp.float32(1)},
            {"x": x},
            {"rate": rate},
            jnp.float32(0.5),
            mode=mode,
            tick=lambda done, total: ticks.append((done, total)),
        )
    w, means = 1.0, []
    for row, step in zip(x, rate, strict=True):
        means.append(w * row.mean())
        w -= step * means[-1] * 0.5
    assert_close((state, metrics), ({"w": w}, {"mean": means, "total": x.sum(1)}))
    assert ticks == ([(3, 3)] if mode == "scan" else [(1, 3), (2, 3), (3, 3)])


def test_a_finished_training_is_restored_without_a_step(blobs):
    config, saver, seen = FitConfig(epochs=2, batch_size=60), Memory(9), Seen()
    trained = fit(LINEAR, *blobs, config, KEY, saver=saver)
    assert_same(fit(LINEAR, *blobs, config, KEY, saver=saver, callback=seen), trained)
    assert seen.ticks == []


def test_the_key_decides_everything(blobs):
    config = FitConfig(epochs=1, batch_size=60)
    one, again, other = (fit(LINEAR, *blobs, config, jax.random.key(seed)) for seed in (1, 1, 2))
    assert_same(one, again)
    assert not np.array_equal(one["params"]["w"], other["params"]["w"])


def test_an_epoch_draws_each_image_once_and_the_next_in_another_order():
    first, second = (draw(jax.random.fold_in(KEY, epoch), 10, 3, 3)["index"] for epoch in range(2))
    assert first.shape == (3, 3) and len(set(first.ravel().tolist())) == 9
    assert not np.array_equal(first, second)


# --- learning


@pytest.mark.parametrize(
    "config",
    [
        FitConfig(epochs=6, batch_size=60, optimizer="adam", learning_rate=3e-3),
        pytest.param(
            FitConfig(epochs=6, batch_size=60, optimizer="sgd", learning_rate=0.05, schedule="cosine"),
            marks=pytest.mark.slow,
        ),
        FitConfig(epochs=6, batch_size=60, optimizer="sgd", learning_rate=0.05, schedule="step", weight_decay=5e-4),
    ],
    ids=["adam", "sgd-cosine", "sgd-step"],
)
def test_fit_learns(config, blobs):
    seen = Seen()
    variables = fit(cnn(), *blobs, config, KEY, callback=seen)
    assert accuracy(predict(cnn(), variables, blobs[0]), blobs[1]) > 0.9
    assert seen.arrays[-1]["train_loss"] < seen.arrays[0]["train_loss"]
    assert seen.arrays[-1]["train_accuracy"] > seen.arrays[0]["train_accuracy"]


def test_sgd_is_the_textbook_one(blobs):
    """Whole-batch softmax regression by hand: L2 into the gradient, then momentum, then the rate, as PyTorch does."""
    config = FitConfig(3, len(blobs[0]), "sgd", learning_rate=0.3, momentum=0.8, weight_decay=0.1, schedule="step")
    fitted = fit(LINEAR, *blobs, config, KEY)["params"]
    x, y = blobs[0].reshape(200, 64) / 255, np.eye(4)[blobs[1]]
    params = {
        name: np.asarray(value, np.float64) for name, value in LINEAR.init(jax.random.split(KEY)[0])["params"].items()
    }
    trace = dict.fromkeys(params, 0.0)
    for rate in (0.3, 0.03, 0.003):  # of 3 steps, 50 % is step 1 and 75 % is step 2
        scores = np.exp(x @ params["w"] + params["b"])
        error = (scores / scores.sum(1, keepdims=True) - y) / len(x)
        gradient = {"w": x.T @ error, "b": error.sum(0)}
        for name in params:
            trace[name] = gradient[name] + 0.1 * params[name] + 0.8 * trace[name]
            params[name] = params[name] - rate * trace[name]
    assert_close(fitted, params)


def test_learning_rates_by_hand():
    assert_close(learning_rates("constant", 0.5, 6), np.full(6, 0.5))
    step = learning_rates("step", 0.5, 8)
    assert_close(step, np.array([0.5] * 4 + [0.05] * 2 + [0.005] * 2))
    cosine = learning_rates("cosine", 0.5, 8)
    assert_close(cosine, np.array([0.25 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]))
    assert cosine[0] == 0.5 and cosine[4] == pytest.approx(0.25) and cosine.dtype == np.float32


@jax.numpy_dtype_promotion("standard")  # flax's BatchNorm needs it for bfloat16
def test_bfloat16_keeps_float32_parameters(blobs):
    config = FitConfig(epochs=6, batch_size=60, learning_rate=3e-3, precision="bfloat16")
    variables = fit(cnn(config.dtype), *blobs, config, KEY)
    predicted = predict(cnn(config.dtype), variables, blobs[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert accuracy(predicted, blobs[1]) > 0.9


def test_the_watch_is_told_of_every_step_and_epoch_without_the_last_smaller_batch(blobs):
    seen = Seen()
    fit(LINEAR, *blobs, FitConfig(epochs=2, batch_size=60), KEY, callback=seen)
    assert seen.ticks == [("training", done, 6) for done in range(1, 7)]
    assert seen.steps == [1, 2]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_other_values_compile_nothing_new(optimizer, blobs):
    fit(LINEAR, *blobs, FitConfig(1, 60, optimizer), KEY)
    before = compiled_programs()
    other = FitConfig(2, 60, optimizer, learning_rate=0.07, momentum=0.3, weight_decay=0.01)
    fit(LINEAR, *blobs, other, jax.random.key(5))
    assert compiled_programs() == before


# --- what cannot work


@pytest.mark.parametrize(
    ("devices", "batch", "words"),
    [(1, 201, "batch_size=201.* the 200 training images"), (4, 50, "batch_size=50 .* over 4 devices.*multiple of 4")],
)
def test_a_batch_that_does_not_fit_is_refused(devices, batch, words, blobs):
    with parallel.using(devices), pytest.raises(InputError, match=words):
        fit(LINEAR, *blobs, FitConfig(batch_size=batch), KEY)


def test_more_devices_than_there_are_are_refused_and_zero_means_all():
    with pytest.raises(InputError, match="devices=99 .* has 4"), parallel.using(99):
        pass
    assert parallel.count() == 1
    with parallel.using(0):
        assert parallel.count() == 4


def test_a_rate_too_large_is_named_with_its_step(blobs):
    config = FitConfig(epochs=5, batch_size=60, optimizer="sgd", learning_rate=1e30)
    with pytest.raises(InputError, match=r"loss became (nan|inf) at step [1-9] with learning rate 1e\+30"):
        fit(cnn(), *blobs, config, KEY)


def test_images_that_are_not_numbers_are_found_at_their_step_and_not_saved(blobs):
    images, saver = blobs[0].astype(np.float32) / 255, Memory(9)
    images[7] = np.nan
    with pytest.raises(InputError, match="loss became nan at step [0-2] with learning rate 0.001"):
        fit(LINEAR, images, blobs[1], FitConfig(batch_size=60), KEY, saver=saver)
    assert saver.kept is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 0}, "fit.epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "fit.batch_size must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "fit.learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": math.nan}, "fit.learning_rate must be positive and finite, got nan"),
        ({"momentum": 1.0}, r"fit.momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1e-4}, "fit.weight_decay must be zero or more and finite, got -0.0001"),
    ],
)
def test_a_recipe_out_of_range_is_refused(wrong, words):
    with pytest.raises(InputError, match=words):
        FitConfig(**wrong)


# --- prediction


@pytest.mark.parametrize(("total", "batch"), [(1, 500), (7, 3), (200, 64), (200, 500)])
def test_predictions_do_not_depend_on_the_batches(total, batch, blobs):
    variables, images = LINEAR.init(KEY), blobs[0][:total]
    expected = np.argmax(LINEAR.logits(variables, jnp.asarray(images, jnp.float32) / 255), -1)
    for stored in (images, images.astype(np.float32) / 255):
        predicted = predict(LINEAR, variables, stored, batch)
        assert predicted.dtype == np.int32
        np.testing.assert_array_equal(predicted, expected)


def test_no_images_no_predictions(blobs):
    predicted = predict(LINEAR, LINEAR.init(KEY), blobs[0][:0])
    assert predicted.shape == (0,) and predicted.dtype == np.int32
