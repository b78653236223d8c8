"""Attacks that train networks of their own: ISSBA against NumPy, and both from end to end, on one device and four."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import trained_task

from bdjax import attacks, registry
from bdjax.attacks import _dynamic, iad, issba
from bdjax.config import Experiment
from bdjax.engine import FitConfig, parallel
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.context import Context
from bdjax.pipelines.poisoned_set import poisoned_set
from bdjax.pipelines.training import train
from bdjax.types import Callback, SampleInfo

KEY = jax.random.key(7)
IAD = iad.Config(width=4, downs=2, epochs=1, batch_size=40, target=1)
ISSBA = issba.Config(bits=4, epochs=1, batch_size=40, learning_rate=3e-3)


class Losses(Callback):
    """Keeps the mean loss of every epoch of the stages, in order."""

    def __init__(self):
        self.seen = []

    def on_round_end(self, step, variables, **arrays):
        self.seen.append(float(arrays["train_loss"]))


def place_of(role):
    return SampleInfo(jnp.arange(len(role)), jnp.asarray(role, jnp.int8), jax.random.split(KEY, len(role)), None)


# --- issba


def test_w_rises_only_after_the_decoder_has_read_and_a_while():
    config = dataclasses.replace(ISSBA, weight=10.0, wait=100, ramp=300)
    found = [float(issba._image_weight(config, jnp.int32(since))) for since in (-1, 0, 100, 250, 400, 9000)]
    np.testing.assert_allclose(found, [0, 0, 0, 5, 10, 10])


def hiding(config, images, since):
    encoder, decoder = issba._networks(config, images.shape[1:])
    params = {"encoder": encoder.init(KEY)["params"], "decoder": decoder.init(KEY)["params"]}
    info = place_of([0] * len(images))
    state = {"since": jnp.int32(since)}
    batch = issba._train_step(
        config, {"params": params, "state": state}, images, jnp.zeros(len(images), jnp.int32), info
    )
    return encoder, decoder, {name: {"params": p, "batch_stats": {}} for name, p in params.items()}, info, batch


@pytest.mark.slow
def test_hiding_is_paid_by_cross_entropy_and_square(blobs):
    config = dataclasses.replace(ISSBA, weight=7.0, wait=0, ramp=1)
    images = jnp.asarray(blobs[0][:6], jnp.float32) / 255
    encoder, decoder, of, info, batch = hiding(config, images, since=5)
    codes = np.stack([np.asarray(jax.random.bernoulli(key, 0.5, (4,))) for key in info.key])
    shown = encoder.apply(of["encoder"], images, jnp.asarray(codes, jnp.float32))[0]
    chance = 1 / (1 + np.exp(-np.asarray(decoder.apply(of["decoder"], shown)[0], np.float64)))
    crossed = -np.log(np.where(codes, chance, 1 - chance)).mean()
    np.testing.assert_allclose(
        batch.loss, crossed + 7 * ((np.asarray(shown) - np.asarray(images)) ** 2).mean(), rtol=1e-5
    )
    assert 0 < codes.mean() < 1 and int(batch.state["since"]) == 6


@pytest.mark.slow
def test_steps_are_counted_from_the_first_batch_that_is_read(blobs, monkeypatch):
    images = jnp.asarray(blobs[0][:6], jnp.float32) / 255
    assert int(hiding(ISSBA, images, since=-1)[-1].state["since"]) == -1  # no chance to read 90 % at the beginning
    monkeypatch.setattr(issba, "DECODED", -1.0)
    assert int(hiding(ISSBA, images, since=-1)[-1].state["since"]) == 0


@pytest.mark.slow
def test_the_decoder_learns_to_read_and_the_trigger_is_the_stored_code(blobs):
    losses, config = Losses(), dataclasses.replace(ISSBA, bits=1, epochs=10, learning_rate=1e-3)
    arrays = issba.prepare(config, trained_task(*blobs, losses), KEY)
    assert losses.seen[0] > 0.65 and losses.seen[-1] < 0.2 and arrays["bit_accuracy"] > 0.95
    assert arrays["code"].dtype == np.uint8 and arrays["code"].shape == (1,)
    images = jnp.asarray(blobs[0][:7], jnp.float32) / 255
    trigger = attacks.trigger_of("issba", config, arrays)
    out = trigger(images, KEY)
    np.testing.assert_array_equal(out, trigger(images, jax.random.key(1)))  # the same code whatever the key
    assert out.shape == images.shape and float(out.min()) >= 0 and float(out.max()) <= 1
    other = attacks.trigger_of("issba", config, {**arrays, "code": 1 - arrays["code"]})(images, KEY)
    assert bool((out != other).any(axis=(1, 2, 3)).all())


@pytest.mark.slow
def test_issba_plants_in_a_tiny_task(blobs):
    planted = attacks.plant("issba", dataclasses.replace(ISSBA, ratio=0.2, target=1), trained_task(*blobs), KEY)
    assert len(planted.poison.indices) == 40 and (planted.poison.labels == 1).all()
    assert {blobs[1][i] for i in planted.poison.indices} == {0, 1, 2, 3}


# --- both


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pmap", "jit"])
@pytest.mark.parametrize("name", ["iad", "issba"])
def test_four_devices_do_what_one_does(name, form, blobs):
    """The mask network and the decoder, then the victim, for a step each: forward values to 1e-4, Adam's mostly."""
    uneven = dataclasses.replace(IAD, ratio=0.15, cross=0.25)  # pairs reach from one device to another
    config, results = {"iad": uneven, "issba": ISSBA}[name], []
    images, labels = blobs[0][:40], blobs[1][:40]
    for devices in (1, 4):
        losses = Losses()
        with parallel.using(devices, form):
            planted = attacks.plant(name, config, trained_task(images, labels, losses), KEY)
        results.append((losses.seen, planted.variables, planted.arrays))
    (one, variables, arrays), (four, others, same) = results
    np.testing.assert_allclose(one, four, rtol=1e-4)
    assert len(one) == 2
    if name == "iad":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), variables, others)
    for key in arrays:
        if "batch_stats" in key:
            np.testing.assert_allclose(arrays[key], same[key], atol=1e-4, err_msg=key)
        elif "params" in key:
            assert np.isclose(arrays[key], same[key], atol=1e-4).mean() > 0.9, key


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("iad", "mask network"), ("iad", "training"), ("issba", "encoder")])
def test_a_killed_training_resumes_and_the_stored_arrays_make_the_same_trigger(
    name, stage, blobs, blobs_npz, tmp_path, monkeypatch
):
    config = dataclasses.replace({"iad": IAD, "issba": ISSBA}[name], epochs=2, ratio=0.25)
    experiment = Experiment(name, dataset=blobs_npz, model="cnn", attack_config=config, fit=FitConfig(2, 40))
    kept, plant = {}, attacks.plant
    monkeypatch.setattr(attacks, "plant", lambda *args: kept.setdefault("planted", plant(*args)))
    train(experiment, tmp_path / "whole", Context(devices=1))

    def tick(now, done, total):
        if (now, done) == (stage, 6):  # in the second epoch of 4 steps
            raise Killed

    with pytest.raises(Killed):
        train(experiment, tmp_path / "cut", Context(devices=1, tick=tick))
    train(experiment, tmp_path / "cut", Context(devices=1))
    stored, again = (checkpoint.read_arrays(tmp_path / where, "trigger") for where in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, stored, again)
    images = jnp.asarray(blobs[0][160:], jnp.float32) / 255
    own = {key: value for key, value in stored.items() if not key.startswith("on_")}
    triggers = [attacks.trigger_of(name, config, arrays) for arrays in (kept["planted"].arrays, own)]
    np.testing.assert_array_equal(*(trigger(images, KEY) for trigger in triggers))
    if name == "issba":
        _, x, y, indices = poisoned_set(tmp_path / "cut")
        assert len(indices) == 40 and len(x) == 160 and (y[indices] == 0).all()


@pytest.mark.parametrize("shape", [(28, 28, 1), (9, 11, 3), (32, 32, 3), (64, 48, 1)])
@pytest.mark.parametrize("name", ["iad", "issba"])
def test_images_of_any_size(name, shape):
    networks = {"iad": _dynamic.networks, "issba": issba._networks}[name]
    net, _ = networks(registry.load("attacks", name).Config(), shape)
    codes = [jnp.ones((2, 100))] if name == "issba" else []

    def run(images):
        return net.apply(net.init(KEY), images, *codes)[0]

    assert jax.eval_shape(run, jnp.zeros((2, *shape))).shape == (2, *shape)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("iad", {"labels": "clean"}, "attack.labels must be .* got clean"),
        ("iad", {"cross": 0.0}, "attack.cross must be positive and finite, got 0.0"),
        ("iad", {"ratio": 0.7, "cross": 0.4}, "attack.ratio=0.7 and attack.cross=0.4 must not exceed 1"),
        ("iad", {"width": 0}, "attack.width must be at least 1, got 0"),
        ("iad", {"clip": 0.0}, "attack.clip must be positive and finite, got 0.0"),
        ("iad", {"milestones": (5, 5)}, r"attack.milestones must be ascending .* got \(5, 5\)"),
        ("iad", {"density": 1.0}, r"attack.density must be in \[0, 1\), got 1.0"),
        ("iad", {"diversity": -1.0}, "attack.diversity must be zero or more and finite, got -1.0"),
        ("issba", {"bits": 0}, "attack.bits must be at least 1, got 0"),
        ("issba", {"wait": -1}, "attack.wait must be zero or more and finite, got -1"),
        ("issba", {"learning_rate": 0.0}, "attack.learning_rate must be positive and finite, got 0.0"),
        ("issba", {"weight": -2.0}, "attack.weight must be zero or more and finite, got -2.0"),
    ],
)
def test_a_value_out_of_range_is_refused(name, fields, words):
    with pytest.raises(InputError, match=words):
        registry.load_module("attacks", name).Config(**fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("iad", {"downs": 4}, "attack.downs=4 halves images of 8x8 pixels to nothing. Use at most 3"),
        ("iad", {"ratio": 0.001}, "attack.ratio=0.001 of 200 images is none"),
        ("issba", {"learning_rate": 1e30}, "encoder loss became .* rate 1e.30. Use a smaller attack.learning_rate"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(name, fields, words, blobs):
    config = dataclasses.replace({"iad": IAD, "issba": ISSBA}[name], **fields)
    with pytest.raises(InputError, match=words):
        attacks.plant(name, config, trained_task(*blobs), KEY)
