"""The reference methods: idealised unlearning with the true trigger, naive adversarial training."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose

from bdjax import registry
from bdjax.defenses import ibu, naive_at
from bdjax.engine import FitConfig, fit, parallel
from bdjax.errors import InputError
from bdjax.pipelines.opening import open_artifact
from bdjax.types import Callback, DefenderView, Victim

KEY, MODEL = jax.random.key(0), perceptron()


def corner(images, key):
    return images.at[:, -3:, -3:].set(1.0)


@pytest.fixture(scope="module")
def backdoored(blobs):
    """Learns that a white corner means 2."""
    images, labels = blobs[0].copy(), blobs[1].copy()
    images[:80, -3:, -3:], labels[:80] = 255, 2
    fitted = fit(MODEL, images, labels, FitConfig(30, 40, learning_rate=1e-2), KEY)
    return Victim(MODEL, fitted)


def rates(variables, blobs):
    images = jnp.asarray(blobs[0], jnp.float32) / 255
    others = blobs[1] != 2
    clean = MODEL.logits(variables, images).argmax(-1)
    stamped = MODEL.logits(variables, corner(images, KEY)).argmax(-1)
    return float((clean == blobs[1]).mean()), float((stamped == 2)[others].mean())


def test_ibu_unlearns_the_trigger_that_it_is_given(backdoored, blobs):
    assert rates(backdoored.variables, blobs)[1] > 0.8
    view = DefenderView(*blobs, trigger=corner)
    cleaned = ibu.purify(ibu.Config(epochs=30, batch_size=40, learning_rate=0.1), backdoored, view, KEY)
    acc, asr = rates(cleaned, blobs)
    assert acc > 0.95 and asr < 0.1


def test_ibu_without_a_trigger_is_refused(backdoored, blobs):
    with pytest.raises(InputError, match="ibu needs the true trigger"):
        ibu.purify(ibu.Config(), backdoored, DefenderView(*blobs), KEY)


def test_only_methods_that_say_so_are_given_the_trigger(finished):

    directory, _ = finished
    artifact = open_artifact(directory / "victim", "ibau", registry.load("defenses", "ibau").Config())
    assert artifact.view().trigger is None and callable(artifact.view(trigger=True).trigger)
    specs = {name: registry.load("defenses", name) for name in registry.names("defenses")}
    asking = [name for name, spec in specs.items() if spec.needs_trigger(spec.Config())]
    assert asking == ["actft", "ep", "ibu"]


def test_one_round_of_naive_at_equals_a_plain_computation(backdoored, blobs):
    """One batch of all images: one normalised step of the perturbation, one Adam step (its first is the sign)."""
    config = naive_at.Config(rounds=1, batch_size=40, passes=2, step=0.7, norm_bound=1.0, learning_rate=1e-3)
    seen = {}

    class Look(Callback):
        def on_round_end(self, step, variables, **arrays):
            seen.update(arrays)

    view = DefenderView(blobs[0][:40], blobs[1][:40], Look())
    cleaned = naive_at.purify(config, backdoored, view, KEY)
    images, labels = jnp.asarray(view.images, jnp.float32) / 255, view.labels

    def loss(delta, params):
        logits = MODEL.logits({"params": params, "batch_stats": {}}, images + delta)
        return -jax.nn.log_softmax(logits)[jnp.arange(40), labels].mean()

    params, delta = backdoored.variables["params"], jnp.zeros((1, 8, 8, 1))
    for _ in range(2):
        gradient = jax.grad(loss)(delta, params)
        delta = delta + 0.7 * gradient / jnp.linalg.norm(gradient)
        delta = delta * min(1.0, 1 / float(jnp.linalg.norm(delta)))
    assert_allclose(seen["perturbation"], delta, atol=1e-5)
    gradient = jax.grad(loss, 1)(delta, params)
    expected = jax.tree.map(lambda p, g: p - 1e-3 * g / (jnp.abs(g) + 1e-8), params, gradient)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), cleaned["params"], expected)


def test_four_devices_agree_with_one(backdoored, blobs):
    def run(devices):
        with parallel.using(devices):
            return naive_at.purify(naive_at.Config(rounds=2, batch_size=40), backdoored, DefenderView(*blobs), KEY)

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), run(1), run(4))


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (ibu, "epochs", 0), (ibu, "learning_rate", 0.0), (naive_at, "rounds", 0), (naive_at, "norm_bound", 0.0),
        (naive_at, "step", -1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(module, name, value):
    with pytest.raises(InputError, match=f"defense.{name} must be .*, got {value}"):
        dataclasses.replace(module.Config(), **{name: value})
