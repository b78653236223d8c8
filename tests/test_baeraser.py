"""BAERASER's unlearning against its formula, the check of its iterations, and MESA's fine-tuning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose, assert_array_equal

from bdjax.defenses import baeraser, mesa_finetune
from bdjax.defenses._pool import Pool
from bdjax.engine import parallel
from bdjax.engine.clock import compiled_programs
from bdjax.errors import InputError
from bdjax.types import Callback, DefenderView, Model, Victim

KEY = jax.random.key(0)
MODEL = perceptron()
ONE = baeraser.Config(
    form="additive", epochs=1, steps=1, batch_size=40, learning_rate=0.1, holdout=0.0, largest_drop=1.0
)


def _linear(variables, images, train=False, keys=None, axis_name=None):
    flat = images.reshape(len(images), -1)
    return flat @ variables["params"]["kernel"], {"flat": flat}, variables["batch_stats"]


LINEAR = Model(
    "linear", (8, 8, 1), 4, lambda key: {"params": {"kernel": jax.random.normal(key, (64, 4)) / 8}, "batch_stats": {}},
    _linear,
)  # fmt: skip


class Recording(Callback):
    def __init__(self):
        self.rows = []

    def on_round_end(self, step, variables, **arrays):
        self.rows.append((step, jax.tree.map(np.asarray, variables), arrays))


@pytest.fixture
def view(blobs):
    return DefenderView(blobs[0][:40], blobs[1][:40], Recording())


@pytest.fixture
def recovered(monkeypatch):
    """One accepted trigger, for label 2: all pixels 0.1 brighter. The triggers for labels 0 and 1 are not accepted."""
    triggers = jnp.stack([jnp.full((8, 8, 1), value) for value in (0.1, -0.5, 0.3)])
    accepted = jnp.array([True, False, False])
    pool = Pool(triggers, jnp.array([2, 1, 0], jnp.int32), jnp.array([1.0, 0.2, 0.1]), accepted)
    for module in (baeraser, mesa_finetune):
        monkeypatch.setattr(module, "recover", lambda *_: pool)
    return pool


@pytest.fixture
def nothing(monkeypatch):
    pool = Pool(jnp.zeros((4, 8, 8, 1)), jnp.arange(4, dtype=jnp.int32), jnp.full(4, 0.3), jnp.zeros(4, bool))
    for module in (baeraser, mesa_finetune):
        monkeypatch.setattr(module, "recover", lambda *_: pool)


def slope(images, labels, weight, kernel, cap=np.inf):
    """Gradient of the weighted sum of the linear model's cross-entropies, those above `cap` left out, in float64."""
    chances = np.exp(images @ kernel)
    chances /= chances.sum(1, keepdims=True)
    weight = weight * (-np.log(chances[np.arange(len(labels)), labels]) < cap)
    return images.T @ ((chances - np.eye(4)[labels]) * weight[:, None])


def plain_steps(config, kernel, view, cap=np.inf):
    """Steps of SGD on Eq. 4 for the linear model, each over all images, with the trigger of `recovered`."""
    images, labels = view.images.reshape(40, -1) / 255.0, view.labels
    others, start, speed = (labels != 2) / (labels != 2).sum(), kernel, 0
    for _ in range(config.epochs):
        clean = slope(images, labels, np.full(40, 1 / 40), kernel)
        ascent = slope(np.clip(images + 0.1, 0, 1), np.full(40, 2), others, kernel, cap)
        omega = np.abs(clean)
        gradient = config.alpha * (clean - ascent) + config.beta * omega * np.sign(kernel - start)
        speed = config.momentum * speed + gradient
        kernel = kernel - config.learning_rate * speed
    return kernel


def quarters(backdoor=0.0, scale=0.2):
    """A model that is always right about the blobs: it sums each quarter; class 2 also gets a share of all pixels."""
    kernel = np.zeros((8, 8, 4), np.float32)
    for label in range(4):
        row, column = divmod(label, 2)
        kernel[4 * row : 4 * row + 4, 4 * column : 4 * column + 4, label] = scale
    kernel[..., 2] += backdoor
    return Victim(LINEAR, {"params": {"kernel": jnp.asarray(kernel.reshape(64, 4))}, "batch_stats": {}})


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_unlearning_is_descent_on_equation_four(recovered, view, beta):
    victim = quarters(0.3)
    config = dataclasses.replace(ONE, epochs=4, alpha=0.7, beta=beta, ascent_margin=100.0)
    out = baeraser.purify(config, victim, view, KEY)
    kernel = np.asarray(victim.variables["params"]["kernel"], np.float64)
    expected = plain_steps(config, kernel, view)
    assert np.abs(expected - kernel).max() > 0.02
    other = plain_steps(dataclasses.replace(config, beta=5 - beta), kernel, view)
    assert np.abs(expected - other).max() > 0.01
    assert_allclose(out["params"]["kernel"], expected, atol=2e-6)
    steps, last, arrays = zip(*view.callback.rows, strict=True)
    assert steps == (1, 2, 3, 4) and [row["theta_steps"] for row in arrays] == [1, 2, 3, 4]
    assert_array_equal(last[-1]["params"]["kernel"], out["params"]["kernel"])
    assert_array_equal(arrays[0]["suspected"], [2])
    assert_array_equal(arrays[0]["recovered"], recovered.triggers[:1])


def test_the_ascent_ends_at_its_margin(recovered, view):
    """Images whose triggered loss is above log C + margin have no gradient; between them and the rest lies the cap."""
    victim = quarters()
    config = dataclasses.replace(ONE, ascent_margin=0.9)
    images = np.clip(view.images.reshape(40, -1) / 255.0 + 0.1, 0, 1)
    kernel = np.asarray(victim.variables["params"]["kernel"], np.float64)
    logits = images @ kernel
    losses = (np.log(np.exp(logits).sum(1)) - logits[:, 2])[view.labels != 2]
    cap = np.log(4) + 0.9
    assert losses.min() < cap - 0.01 and losses.max() > cap + 0.01
    out = baeraser.purify(config, victim, view, KEY)["params"]["kernel"]
    assert_allclose(out, plain_steps(config, kernel, view, cap), atol=2e-6)
    assert np.abs(np.asarray(out) - plain_steps(config, kernel, view)).max() > 1e-4


def test_the_penalty_is_omega_times_the_distance_and_omega_is_a_constant():
    original = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([[0.0]])}
    params = {"a": jnp.array([1.5, -2.0, 0.0]), "b": jnp.array([[-3.0]])}
    omega = {"a": jnp.array([2.0, 7.0, 0.25]), "b": jnp.array([[0.5]])}
    value, (slope_, original_slope, none) = jax.value_and_grad(baeraser.deviation, (0, 1, 2))(params, original, omega)
    assert_allclose(value, 0.5 * 2 + 0.5 * 0.25 + 3 * 0.5)
    assert_allclose(slope_["a"], [2.0, 0.0, -0.25])  # no distance, no derivative
    assert_allclose(slope_["b"], [[-0.5]])
    assert_allclose(original_slope["a"], [-2.0, 0.0, 0.25])
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(none))

    def moving(params):  # were ω differentiated, its own dependence on θ would count
        return baeraser.deviation(params, original, jax.tree.map(lambda p: p**2, params))

    assert_allclose(jax.grad(moving)(params)["a"], [1.5**2, 0.0, 0.0])


@pytest.mark.parametrize("size", [7, 40])
def test_importance_is_the_absolute_gradient_of_the_mean(view, size):
    variables = LINEAR.init(KEY)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    expected = np.abs(slope(view.images.reshape(40, -1) / 255.0, view.labels, np.full(40, 1 / 40), kernel))
    assert_allclose(baeraser.importance(LINEAR, variables, view, size)["kernel"], expected, rtol=1e-4, atol=1e-7)


def test_the_larger_beta_over_alpha_the_less_the_weights_move(recovered, view):
    victim, moved = quarters(0.5), []
    for ratio in (0.01, 1.0, 100.0, 1e4):
        config = dataclasses.replace(ONE, epochs=5, alpha=min(1.0, 1 / ratio), beta=min(1.0, ratio))
        out = baeraser.purify(config, victim, view, KEY)
        moved.append(np.linalg.norm(np.asarray(out["params"]["kernel"] - victim.variables["params"]["kernel"])))
    assert moved[0] > moved[1] > moved[2] > moved[3]
    assert moved[3] < 0.02 * moved[0]  # what remains is the oscillation around θ_0 that the penalty causes


@pytest.mark.parametrize(("alpha", "steps"), [(1.0, 10), (0.25, 40), (4.0, 10)])
def test_a_small_alpha_gets_more_steps(recovered, view, alpha, steps):
    config = dataclasses.replace(ONE, steps=0, batch_size=40, alpha=alpha, learning_rate=1e-4)
    baeraser.purify(config, quarters(0.1), view, KEY)
    assert view.callback.rows[-1][2]["theta_steps"] == steps


def test_iterations_are_checked_on_the_validation_images_of_the_view(recovered, view):
    """All validation labels are wrong, so the measured accuracy is low."""
    wrong = dataclasses.replace(view, labels=(view.labels + 1) % 4, validation=None)
    config = dataclasses.replace(ONE, epochs=1, holdout=0.5, largest_drop=0.0, learning_rate=1e-4)
    baeraser.purify(config, quarters(0.1), dataclasses.replace(view, validation=wrong), KEY)
    assert float(view.callback.rows[-1][2]["guard_accuracy"]) < 0.3


def test_unlearning_frees_the_model_of_a_trigger(recovered, view):
    victim = quarters(0.1)
    config = dataclasses.replace(ONE, epochs=12, steps=0, batch_size=10, learning_rate=0.02)
    out = baeraser.purify(config, victim, view, KEY)
    images = jnp.asarray(view.images, jnp.float32) / 255
    before, after = (
        (np.asarray(LINEAR.logits(v, images + 0.1)).argmax(1) == 2)[view.labels != 2].mean()
        for v in (victim.variables, out)
    )
    assert before == 1 and after == 0
    assert (np.asarray(LINEAR.logits(out, images)).argmax(1) == view.labels).mean() > 0.95
    assert view.callback.rows[-1][2]["guard_asr"] == 0 and len(view.callback.rows) == 12


def test_an_iteration_that_costs_accuracy_is_undone_and_the_rate_halved(recovered, view):
    config = dataclasses.replace(ONE, epochs=30, learning_rate=2000.0, largest_drop=0.05, beta=1000.0)
    out = baeraser.purify(config, quarters(), view, KEY)
    images = jnp.asarray(view.images, jnp.float32) / 255
    assert (np.asarray(LINEAR.logits(out, images)).argmax(1) == view.labels).mean() >= 0.95
    rows = [arrays for _, _, arrays in view.callback.rows]
    assert rows[0]["rate"] in {2000.0 / 2**k for k in range(1, 30)} and rows[0]["theta_steps"] == 1
    assert len(rows) == 30  # those that were undone are not counted
    assert all(row["guard_accuracy"] >= 0.95 for row in rows)
    with pytest.raises(InputError, match="none of 6 iterations.*largest_drop=0.05.*--defense.learning-rate"):
        baeraser.purify(dataclasses.replace(config, epochs=2), quarters(), view, KEY)


def test_a_loss_that_is_not_finite_is_undone(recovered, view):
    config = dataclasses.replace(ONE, epochs=1, steps=3, learning_rate=3e38, ascent_margin=1e3)
    with pytest.raises(InputError, match="kept the loss finite"):
        baeraser.purify(config, quarters(), view, KEY)


def test_held_out_images_are_not_trained_on(view):
    training, held_out = baeraser._hold_out(dataclasses.replace(ONE, holdout=0.25), view, KEY)
    rows = {image.tobytes() for image in training.images}
    assert (len(training.labels), len(held_out.labels)) == (30, 10) and len(rows) == 30
    assert not rows & {image.tobytes() for image in held_out.images}
    assert training.callback is view.callback
    assert baeraser._hold_out(ONE, view, KEY) == (view, view)


@pytest.mark.parametrize("module", [baeraser, mesa_finetune])
def test_without_a_suspected_label_the_model_is_returned_unchanged(nothing, view, module):
    victim = Victim(MODEL, MODEL.init(KEY))
    out = module.purify(module.Config(form="additive"), victim, view, KEY)
    jax.tree.map(assert_array_equal, out, dict(victim.variables))
    ((step, _, arrays),) = view.callback.rows
    assert step == 1 and len(arrays["suspected"]) == 0 and arrays["recovered"].shape == (0, 8, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("module", [baeraser, mesa_finetune])
def test_two_devices_agree_with_one(recovered, view, module):
    changes = {"epochs": 2, "batch_size": 6, "learning_rate": 0.05, "form": "additive"}
    config = module.Config(**changes | ({"largest_drop": 1.0} if module is baeraser else {}))
    one = module.purify(config, Victim(MODEL, MODEL.init(KEY)), view, KEY)
    with parallel.using(2):
        two = module.purify(config, Victim(MODEL, MODEL.init(KEY)), view, KEY)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), one, two)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one["params"], MODEL.init(KEY)["params"])
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_other_values_compile_nothing(recovered, view):
    victim = Victim(MODEL, MODEL.init(KEY))
    config = dataclasses.replace(ONE, epochs=2, batch_size=20, steps=10, holdout=0.1)
    baeraser.purify(config, victim, view, KEY)
    before = compiled_programs()
    other = dataclasses.replace(config, alpha=0.5, beta=2.0, learning_rate=0.02, momentum=0.5, ascent_margin=1.0)
    baeraser.purify(other, victim, view, jax.random.key(1))
    assert compiled_programs() == before


@pytest.mark.parametrize("fraction", [1.0, 1e-6])
def test_fine_tuning_is_on_triggered_images_with_true_labels(recovered, view, fraction):
    """All images are triggered, or one, the minimum."""
    victim = Victim(LINEAR, LINEAR.init(KEY))
    config = mesa_finetune.Config(form="additive", epochs=1, batch_size=40, learning_rate=0.5, fraction=fraction)
    out = mesa_finetune.purify(config, victim, view, KEY)["params"]["kernel"]
    kernel = np.asarray(victim.variables["params"]["kernel"], np.float64)
    images, even = view.images.reshape(40, -1) / 255.0, np.full(40, 1 / 40)
    gradient = (kernel - np.asarray(out)) / 0.5
    candidates = [np.where(np.isin(np.arange(40), at)[:, None], np.clip(images + 0.1, 0, 1), images)
                  for at in ([list(range(40))] if fraction == 1 else [[i] for i in range(40)])]  # fmt: skip
    errors = [np.abs(slope(c, view.labels, even, kernel) - gradient).max() for c in candidates]
    assert min(errors) < 1e-6 < 1e-4 < np.abs(slope(images, view.labels, even, kernel) - gradient).max()
    ((_, _, arrays),) = view.callback.rows
    assert_array_equal(arrays["suspected"], [2])
    assert "train_loss" in arrays


def test_fine_tuning_that_diverges_names_its_own_learning_rate(recovered, view):
    config = mesa_finetune.Config(form="additive", epochs=4, batch_size=40, learning_rate=3e38)
    with pytest.raises(InputError, match="fine-tuning loss became .*Use a smaller defense.learning_rate"):
        mesa_finetune.purify(config, quarters(), view, KEY)


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        (baeraser, {"epochs": 0}, "defense.epochs must be at least 1, got 0"),
        (baeraser, {"alpha": 0.0}, "defense.alpha must be positive"),
        (baeraser, {"beta": -1.0}, "defense.beta must be zero or more, got -1.0"),
        (baeraser, {"holdout": 1.0}, r"defense.holdout must be in \[0, 1\)"),
        (baeraser, {"largest_drop": 5.0}, r"defense.largest_drop must be in \[0, 1\], got 5.0"),
        (baeraser, {"size": 0}, "defense.size must be at least 1"),
        (mesa_finetune, {"fraction": 0.0}, r"defense.fraction must be in \(0, 1\]"),
        (mesa_finetune, {"learning_rate": -1.0}, "defense.learning_rate must be positive"),
        (mesa_finetune, {"momentum": 1.0}, r"defense.momentum must be in \[0, 1\)"),
        (mesa_finetune, {"weight_decay": -1.0}, "defense.weight_decay must be zero or more"),
        (mesa_finetune, {"samples": 0}, "defense.samples must be at least 1"),
    ],
)
def test_refused_values(module, change, message):
    with pytest.raises(InputError, match=message):
        module.Config(**change)
