"""Fine-tuning and activation matching against plain computations, their reports, and invalid input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose, assert_array_equal

from bdjax import models
from bdjax.defenses import actft, finetune
from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig, fit, parallel
from bdjax.engine.callbacks import ForwardingCallback
from bdjax.errors import InputError
from bdjax.types import Callback, DefenderView, Victim

KEY, MODEL = jax.random.key(0), perceptron()


def corner(images, key):
    return images.at[:, -3:, -3:].set(1.0)


@pytest.fixture(scope="module")
def backdoored(blobs):
    """Learns that a white corner means 2."""
    images, labels = blobs[0].copy(), blobs[1].copy()
    images[:80, -3:, -3:], labels[:80] = 255, 2
    return Victim(MODEL, fit(MODEL, images, labels, FitConfig(30, 40, learning_rate=1e-2), KEY))


@pytest.fixture(scope="module")
def convolutional():
    """A network with convolutions and batch normalisation."""
    model = models.create("cnn", (8, 8, 1), 4)
    return Victim(model, jax.jit(model.init)(KEY))


class Seen(Callback):
    def __init__(self):
        self.steps, self.ticks, self.losses = [], [], []

    def on_progress(self, stage, done, total):
        self.ticks.append((stage, done, total))

    def on_round_end(self, step, variables, **arrays):
        self.steps.append((step, jax.tree.map(np.array, variables)))
        self.losses.append(arrays.get("loss"))


def test_a_forwarding_callback_forwards_every_call():
    calls = []

    class Recording(Callback):
        def on_progress(self, *arguments):
            calls.append(("on_progress", *arguments))

        def on_round_end(self, step, variables, **arrays):
            calls.append(("on_round_end", step, variables, arrays))

        def on_round_restored(self, step, **values):
            calls.append(("on_round_restored", step, values))

        def on_detection(self, scores):
            calls.append(("on_detection", scores))

        def on_estimate(self, estimated):
            calls.append(("on_estimate", estimated))

    forwarding = ForwardingCallback(Recording())
    forwarding.on_progress("stage", 1, 2)
    forwarding.on_round_end(3, {}, loss=0.5)
    forwarding.on_round_restored(4, loss=0.25)
    forwarding.on_detection("scores")
    forwarding.on_estimate("estimate")
    assert calls == [
        ("on_progress", "stage", 1, 2), ("on_round_end", 3, {}, {"loss": 0.5}),
        ("on_round_restored", 4, {"loss": 0.25}),
        ("on_detection", "scores"), ("on_estimate", "estimate"),
    ]  # fmt: skip
    assert {call[0] for call in calls} == {name for name in vars(Callback) if name[0] != "_"}


# --- fine-tuning


def test_fine_tuning_is_the_engines_training_from_the_victim(backdoored, blobs):
    view = DefenderView(blobs[0][:50], blobs[1][:50], Seen())
    config = finetune.Config(3, 20, "sgd", 0.02, 0.8, 1e-3, "cosine", "none")
    recipe = FitConfig(3, 20, "sgd", 0.02, 0.8, 1e-3, "cosine", "none")
    purified = finetune.purify(config, backdoored, view, KEY)
    expected = fit(MODEL, view.images, view.labels, recipe, KEY, start=backdoored.variables)
    jax.tree.map(assert_array_equal, purified, expected)
    assert [step for step, _ in view.callback.steps] == [1, 2, 3]
    assert view.callback.ticks[-1] == ("fine-tuning", 6, 6)


def test_one_step_of_fine_tuning_is_one_of_sgd(backdoored, blobs):
    view = DefenderView(blobs[0][:16], blobs[1][:16])
    config = finetune.Config(epochs=1, learning_rate=0.1, weight_decay=0.01, schedule="constant", augment="none")
    purified = finetune.purify(config, backdoored, view, KEY)["params"]
    params, images = backdoored.variables["params"], jnp.asarray(view.images, jnp.float32) / 255

    def loss(params):
        logits = MODEL.logits({"params": params, "batch_stats": {}}, images)
        return -jax.nn.log_softmax(logits)[jnp.arange(16), view.labels].mean()

    expected = jax.tree.map(lambda p, g: p - 0.1 * (g + 0.01 * p), params, jax.grad(loss)(params))
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), purified, expected)


def test_the_batch_is_what_there_is_and_what_the_devices_divide(backdoored, blobs):
    recipe = FitConfig(1, 256, "sgd", 0.1)
    callback = Seen()
    with parallel.using(4):
        tune(backdoored, blobs[0][:30], blobs[1][:30], recipe, KEY, callback, "stage", before=5)
        with pytest.raises(InputError, match="3 images cannot be split over 4 devices"):
            tune(backdoored, blobs[0][:3], blobs[1][:3], recipe, KEY, callback, "stage")
    assert callback.ticks == [("stage", 1, 1)] and [step for step, _ in callback.steps] == [6]


def test_a_loss_that_is_not_finite_names_the_defenses_flag(backdoored, blobs):
    config = finetune.Config(epochs=5, learning_rate=1e30, schedule="constant", augment="none")
    with pytest.raises(InputError, match="fine-tuning loss became .* Use a smaller defense.learning_rate"):
        finetune.purify(config, backdoored, DefenderView(*blobs), KEY)


# --- activation matching


def flat(outputs):
    return jnp.concatenate([value.reshape(len(value), -1) for value in outputs], 1)


@pytest.mark.slow
def test_actft_is_a_plain_computation_on_the_convolutions(convolutional, blobs):
    """One batch with every image triggered, two epochs: two steps with momentum on the concatenated maps."""
    callback = Seen()
    view = DefenderView(blobs[0][:12], blobs[1][:12], callback, corner)
    config = actft.Config(epochs=2, fraction=1.0, learning_rate=0.5, momentum=0.5)
    purified = actft.purify(config, convolutional, view, KEY)
    model, clean = convolutional.model, jnp.asarray(view.images, jnp.float32) / 255
    stats = convolutional.variables["batch_stats"]

    def maps(params, images):
        outputs = models.outputs(model, {"params": params, "batch_stats": stats}, images)[0]
        return flat([outputs[f"Conv_{i}/kernel"] for i in range(3)])

    params = convolutional.variables["params"]
    targets, trace, losses = maps(params, clean), jax.tree.map(jnp.zeros_like, params), []
    for _ in range(2):
        value, gradient = jax.value_and_grad(lambda p: ((maps(p, corner(clean, KEY)) - targets) ** 2).mean())(params)
        trace = jax.tree.map(lambda t, g: 0.5 * t + g, trace, gradient)
        params = jax.tree.map(lambda p, t: p - 0.5 * t, params, trace)
        losses.append(float(value))
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), purified["params"], params)
    assert_array_equal(purified["params"]["head"]["kernel"], convolutional.variables["params"]["head"]["kernel"])
    jax.tree.map(assert_array_equal, purified["batch_stats"], stats)
    assert callback.losses == pytest.approx(losses, rel=1e-4) and losses[1] < losses[0]


def test_half_of_each_batch_is_triggered(convolutional, blobs, monkeypatch):
    epochs, real = [], actft.run_epoch

    def spy(step, state, batches, *others, **options):
        epochs.append(batches)
        return real(step, state, batches, *others, **options)

    monkeypatch.setattr(actft, "run_epoch", spy)
    actft.purify(actft.Config(batch_size=8, epochs=2), convolutional, DefenderView(*blobs, trigger=corner), KEY)
    assert all((part["triggered"].sum(1) == 4).all() and part["triggered"].shape == (25, 8) for part in epochs)
    assert len(np.unique(epochs[0]["triggered"], axis=0)) > 10  # another half each time
    assert all(len(np.unique(part["index"])) == 200 for part in epochs)
    assert (epochs[0]["index"] != epochs[1]["index"]).any()


def test_a_trigger_that_changes_nothing_changes_nothing(convolutional, blobs):
    view = DefenderView(blobs[0][:12], blobs[1][:12], trigger=lambda images, key: images)
    purified = actft.purify(actft.Config(learning_rate=1.0), convolutional, view, KEY)
    jax.tree.map(assert_array_equal, purified, dict(convolutional.variables))


def test_statistics_move_in_training_mode_only(convolutional, blobs):
    view = DefenderView(blobs[0][:12], blobs[1][:12], trigger=corner)
    stats = [
        actft.purify(actft.Config(batch_norm=mode), convolutional, view, KEY)["batch_stats"]
        for mode in ("frozen", "batch")
    ]
    pairs = [zip(*map(jax.tree.leaves, (s, convolutional.variables["batch_stats"])), strict=True) for s in stats]
    frozen, batch = (all((np.asarray(a) == b).all() for a, b in pair) for pair in pairs)
    assert frozen and not batch


def test_actft_brings_triggered_images_back_to_their_classes(backdoored, blobs):
    """The perceptron has no convolution: all its layers are matched."""
    others, images = blobs[1] != 2, jnp.asarray(blobs[0], jnp.float32) / 255

    def asr(variables):
        return float((MODEL.logits(variables, corner(images, KEY)).argmax(-1) == 2)[others].mean())

    assert asr(backdoored.variables) > 0.8
    view = DefenderView(*blobs, trigger=corner)
    config = actft.Config(epochs=60, batch_size=40, learning_rate=0.02)
    cleaned = actft.purify(config, backdoored, view, KEY)
    assert asr(cleaned) < 0.1
    assert float((MODEL.logits(cleaned, images).argmax(-1) == blobs[1]).mean()) > 0.95


def test_four_devices_agree_with_one(convolutional, blobs):
    def run(devices):
        with parallel.using(devices):
            view = DefenderView(blobs[0][:40], blobs[1][:40], trigger=corner)
            return actft.purify(actft.Config(batch_size=20, learning_rate=0.1), convolutional, view, KEY)

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), run(1), run(4))


# --- refusals


@pytest.mark.parametrize(
    ("module", "name", "value", "what"),
    [
        (finetune, "epochs", 0, "at least 1"), (finetune, "batch_size", 0, "at least 1"),
        (finetune, "learning_rate", 0.0, "positive"), (finetune, "momentum", 1.0, r"in \[0, 1\)"),
        (finetune, "weight_decay", -1.0, "zero or more"), (actft, "epochs", 0, "at least 1"),
        (actft, "fraction", 0.0, r"in \(0, 1\]"), (actft, "fraction", 1.5, r"in \(0, 1\]"),
        (actft, "learning_rate", 0.0, "positive"), (actft, "momentum", -0.1, r"in \[0, 1\)"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(module, name, value, what):
    with pytest.raises(InputError, match=f"defense.{name} must be {what}, got {value}"):
        dataclasses.replace(module.Config(), **{name: value})


def test_actft_without_a_trigger_or_with_too_few_images_is_refused(backdoored, blobs):
    with pytest.raises(InputError, match="actft needs the true trigger"):
        actft.purify(actft.Config(), backdoored, DefenderView(*blobs), KEY)
    with parallel.using(4), pytest.raises(InputError, match="3 images cannot be split over 4 devices"):
        actft.purify(actft.Config(), backdoored, DefenderView(blobs[0][:3], blobs[1][:3], trigger=corner), KEY)
