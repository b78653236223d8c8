"""Feature coupling, the penalty of the enhanced adaptive attacks, against NumPy."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron

from bdjax import attacks, registry
from bdjax.attacks import _coupling
from bdjax.engine import FitConfig, fit_with_hook, parallel, predict
from bdjax.engine.clock import compiled_programs
from bdjax.errors import InputError
from bdjax.types import Poison, SampleInfo, Task

KEY = jax.random.key(7)
MODEL = perceptron()
RECIPE = FitConfig(epochs=8, batch_size=40, learning_rate=0.01)
NAMES = ("adaptive_blend", "adaptive_patch")
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)
POISON = Poison(  # of target 1: payload 0 and 5, an image of the target itself 4, covers 2 and 7
    np.array([0, 2, 4, 5, 7], np.int32), np.zeros((5, 8, 8, 1), np.uint8), np.array([1, 2, 1, 1, 1], np.int32)
)


def config_of(name="adaptive_blend", **fields):
    return registry.load("attacks", name).Config(target=1, **fields)


def coupled(coupling=1.0, after=0, epoch=0, **changes):
    """(control, attacker as it is in `epoch`) for LABELS and POISON."""
    config = config_of(coupling=coupling, coupling_after=after)
    task = SimpleNamespace(labels=LABELS)
    hook, attacker = _coupling.coupling_hook(config, task, dataclasses.replace(POISON, **changes))
    attacker = jax.tree.map(jnp.asarray, attacker)
    return hook, hook.refresh(hook.config, attacker, None, epoch, KEY)


def value(positions, features, coupling=1.0, **how):
    hook, attacker = coupled(coupling, **how)
    info = SampleInfo(jnp.asarray(positions), None, None, None)
    stages = {"zeroth": jnp.zeros((len(positions), 1)), "flat": features}  # sorted by name, flat would come first
    return hook.penalty(hook.config, attacker, stages, jnp.zeros(len(positions), jnp.int32), info)


def test_groups_by_what_was_done_to_an_image():
    _, attacker = coupled()
    np.testing.assert_array_equal(attacker["fixed"]["group"], [1, 2, 0, 0, 0, 1, 0, 0])


def test_penalty_by_hand():
    features = np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float32)
    order = np.array([3, 0, 6, 5, 1, 7, 2, 4])
    flat = features.reshape(8, 6).astype(np.float64)
    centre = flat[list(order).index(1)]
    expected = np.mean([((flat[list(order).index(i)] - centre) ** 2).sum() / 6 for i in (0, 5)])
    found = value(order, jnp.asarray(features), 0.7)
    assert found.shape == () and float(found) == pytest.approx(0.7 * expected, rel=1e-5)
    twice = np.concatenate([order, [1]])  # a second clean image of the target class moves the mean
    more = np.concatenate([flat, 3 * np.ones((1, 6))])
    expected = np.mean([((flat[list(order).index(i)] - (centre + 3) / 2) ** 2).mean() for i in (0, 5)])
    assert float(value(twice, jnp.asarray(more, jnp.float32))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "positions", [[0, 5, 2, 4, 3], [1, 2, 3, 4], [2, 4, 7]], ids=["no target", "no payload", "none"]
)
def test_a_batch_without_payload_or_target_costs_nothing(positions):
    features = jnp.asarray(np.random.default_rng(1).normal(size=(len(positions), 3)), jnp.float32)
    found, slope = jax.value_and_grad(lambda phi: value(positions, phi))(features)
    assert float(found) == 0
    np.testing.assert_array_equal(slope, 0)


def test_only_payload_is_pulled():
    """d/dphi of mean |phi - c|^2 / d is 2 (phi - c) / (d n) for the payload and nothing for the rest, c included."""
    features = np.random.default_rng(2).normal(size=(8, 3)).astype(np.float32)
    slope = jax.grad(lambda phi: value(np.arange(8), phi, 1.5))(jnp.asarray(features))
    expected = np.zeros((8, 3))
    for i in (0, 5):
        expected[i] = 1.5 * 2 * (features[i] - features[1]) / (3 * 2)
    np.testing.assert_allclose(slope, expected, atol=1e-6)


def test_coupling_begins_after_its_epochs():
    weights = [float(coupled(2.5, 3, epoch)[1]["fixed"]["weight"]) for epoch in range(5)]
    assert weights == [0, 0, 0, 2.5, 2.5]


@pytest.mark.parametrize("name", NAMES)
def test_without_coupling_the_attack_only_writes_data(name):
    module = registry.load("attacks", name)
    assert module.Config().coupling == 0
    assert module.training_hook(config_of(name), SimpleNamespace(labels=LABELS), POISON) is None


def task_of(blobs, attackers=None):
    def controlled(images, labels, key, hook, attacker, **_):
        variables, after = fit_with_hook(MODEL, images, labels, RECIPE, key, hook, attacker)
        (attackers if attackers is not None else []).append(after)
        return variables, after

    return Task(
        *blobs, MODEL, lambda path: None, fit_with_hook=controlled,
        fit=lambda images, labels, key: controlled(images, labels, key, None, None)[0],
    )  # fmt: skip


def distance(variables, planted, blobs):
    """Mean |phi - c|^2 / d over payload, of a planted model in NumPy."""
    images, _ = attacks.poisoned_set(planted.poison, *blobs)
    z = (images / 255).reshape(len(images), -1) @ np.asarray(variables["params"]["body"], np.float64)
    phi = np.where(z > 0, z, np.expm1(np.minimum(z, 0)))
    payload = planted.poison.indices[planted.poison.labels != blobs[1][planted.poison.indices]]
    clean = np.setdiff1d(np.flatnonzero(blobs[1] == 1), planted.poison.indices)
    return ((phi[payload] - phi[clean].mean(0)) ** 2).mean()


@pytest.mark.parametrize("name", NAMES)
def test_an_enhanced_attack_brings_its_images_nearer_to_the_target_class(name, blobs):
    fields = {"ratio": 0.1, "cover": 0.1, "exclude_target": False}
    planted, after = {}, []
    for coupling in (0.0, 1.0):
        config = config_of(name, coupling=coupling, coupling_after=1, **fields)
        planted[coupling] = attacks.plant(name, config, task_of(blobs, after), KEY)
    plain, enhanced = planted.values()
    np.testing.assert_array_equal(plain.poison.images, enhanced.poison.images)
    np.testing.assert_array_equal(plain.poison.labels, enhanced.poison.labels)
    assert distance(enhanced.variables, enhanced, blobs) < 0.8 * distance(plain.variables, plain, blobs)
    assert (predict(MODEL, enhanced.variables, blobs[0]) == blobs[1]).mean() > 0.5
    assert after[0] == {} and float(after[1]["fixed"]["weight"]) == 1


def test_before_its_epochs_the_enhanced_attack_trains_the_plain_model(blobs):
    plain, late = (
        attacks.plant("adaptive_blend", config_of(coupling=c, coupling_after=8), task_of(blobs), KEY).variables
        for c in (0.0, 30.0)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, late)


@pytest.mark.parametrize(("devices", "form"), [(4, "pmap"), (2, "pmap"), (4, "jit")])
def test_devices_share_one_batch(devices, form, blobs):
    config = config_of(coupling=5.0, coupling_after=1)
    alone = attacks.plant("adaptive_blend", config, task_of(blobs), KEY).variables
    with parallel.using(devices, form):
        shared = attacks.plant("adaptive_blend", config, task_of(blobs), KEY).variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone, shared)


def test_another_weight_compiles_nothing(blobs):
    def plant(**fields):
        attacks.plant("adaptive_blend", config_of(**fields), task_of(blobs), KEY)

    plant(coupling=1.0, coupling_after=2)
    found = []
    for coupling in (0.3, 0.4):
        before = compiled_programs()
        plant(coupling=coupling, coupling_after=1)
        found.append(compiled_programs() - before)
    assert found == [1, 1]  # its trigger, which belongs to a Config, and no training step


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"coupling": -1.0}, "attack.coupling must not be negative, got -1.0"),
        ({"coupling": float("nan")}, "attack.coupling must not be negative, got nan"),
        ({"coupling_after": -1}, "attack.coupling_after must not be negative, got -1"),
        ({"coupling": 1.0, "labels": "all_to_all"}, "attack.coupling needs attack.labels all_to_one, got all_to_all"),
        ({"coupling": 1.0, "labels": "clean"}, "attack.coupling needs attack.labels all_to_one, got clean"),
        ({"coupling": 1.0, "cover": 1.0}, r"attack.cover must be in \[0, 1\), got 1.0"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_field_out_of_range_is_named(name, fields, words):
    with pytest.raises(InputError, match=words):
        config_of(name, **fields)
