"""An attacker inside the training step: what it is given, what comes back, on one device and on four."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose, assert_array_equal

from bdjax.engine import FitConfig, capacity, fit, fit_with_hook, parallel
from bdjax.engine.clock import compiled_programs
from bdjax.engine.step import roles
from bdjax.types import Batch, TrainingHook

KEY, SGD = jax.random.key(0), FitConfig(epochs=2, batch_size=40, optimizer="sgd", learning_rate=0.1)


def whiten(config, attacker, images, labels, place):
    chosen = (place.role == 1)[:, None, None, None]
    return Batch(jnp.where(chosen, 1.0, images), jnp.where(place.role == 1, config, labels))


@pytest.mark.parametrize("shares", [(0.1,), (0.1, 0.2), (0.3, 0.3, 0.4), (1.0,), (0.013, 0.5)])
@pytest.mark.parametrize("places", [40, 1000, 1280])
def test_roles_are_exact_and_fit_their_capacity_anywhere(shares, places):
    found = roles(shares, places)
    for role, share in enumerate(shares, 1):
        assert abs((found == role).sum() - share * places) < 1
        for window in (8, 32, 128):
            counts = np.convolve(found == role, np.ones(window, int), "valid")
            assert counts.size == 0 or counts.max() <= capacity(share, window)


def test_a_control_that_does_nothing_changes_nothing(blobs):
    plain = fit(perceptron(), *blobs, SGD, KEY)
    same, attacker = fit_with_hook(
        perceptron(), *blobs, SGD, KEY, TrainingHook("nothing", (0.5,)), {"fixed": jnp.ones(2)}
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), plain, same)
    assert_array_equal(attacker["fixed"], [1, 1])


def test_transformed_images_teach_the_attackers_label(blobs):
    config = FitConfig(epochs=12, batch_size=40, learning_rate=1e-2)
    model, white = perceptron(), jnp.ones((1, 8, 8, 1))
    variables, _ = fit_with_hook(model, *blobs, config, KEY, TrainingHook(2, (0.25,), whiten), {})
    assert model.logits(variables, white).argmax() == 2
    images, labels = jnp.asarray(blobs[0], jnp.float32) / 255, blobs[1]
    assert (model.logits(variables, images).argmax(-1) == labels).mean() > 0.95


def seen_by(config, attacker, images, labels, place):
    """Writes down what it was given: how often each position had each role."""
    state = attacker["state"].at[place.position, place.role.astype(int)].add(1)
    if place.axis:
        state = attacker["state"] + jax.lax.psum(state - attacker["state"], place.axis)
    return Batch(images, labels, 0.0, state)


@pytest.mark.parametrize("devices", [1, 4])
def test_every_position_comes_once_an_epoch_with_its_share_of_roles(blobs, devices):
    with parallel.using(devices):
        hook = TrainingHook("counts", (0.1, 0.2), seen_by)
        _, attacker = fit_with_hook(perceptron(), *blobs, SGD, KEY, hook, {"state": jnp.zeros((200, 3), jnp.int32)})
    assert_array_equal(attacker["state"].sum(1), np.full(200, 2))
    assert_array_equal(attacker["state"].sum(0), 2 * np.array([140, 20, 40]))


def pushed(config, attacker, images, labels, place):
    return Batch(images, labels, ((attacker["params"] - attacker["fixed"]) ** 2).sum())


def step_of(config):
    return optax.sgd(config)


def doubled(config, attacker, variables, epoch, key):
    return {"fixed": attacker["fixed"] * 2}


def test_learned_arrays_follow_their_gradient_and_refresh_comes_before_each_epoch(blobs):
    hook = TrainingHook(0.05, (), pushed, optimizer=step_of, refresh=doubled)
    _, attacker = fit_with_hook(
        perceptron(), *blobs, SGD, KEY, hook, {"params": jnp.zeros(2), "fixed": jnp.array([1.0, 3.0])}
    )
    value, target = np.zeros(2), np.array([1.0, 3.0])
    for _ in range(SGD.epochs):
        target = 2 * target
        for _ in range(5):  # steps an epoch
            value = value - 0.05 * 2 * (value - target)
    assert_allclose(attacker["params"], value, rtol=1e-5)
    assert_array_equal(attacker["fixed"], target)
    assert "opt" not in attacker


def spread(config, attacker, features, labels, place):
    return config * (features["flat"] ** 2).mean()


def test_a_penalty_on_features_shrinks_them(blobs):
    def size(weight):
        variables, _ = fit_with_hook(perceptron(), *blobs, SGD, KEY, TrainingHook(weight, (), penalty=spread), {})
        images = jnp.asarray(blobs[0], jnp.float32) / 255
        return float((perceptron().apply(variables, images)[1]["flat"] ** 2).mean())

    assert size(1.0) < 0.7 * size(0.0)


def test_four_devices_agree_with_one(blobs):
    def trained(devices):
        with parallel.using(devices):
            return fit_with_hook(perceptron(), *blobs, SGD, KEY, TrainingHook(2, (0.25,), whiten), {})[0]

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), trained(1), trained(4))


def test_a_second_run_compiles_nothing_and_leaves_its_inputs_alone(blobs):
    attacker, start = {"fixed": jnp.ones(3)}, perceptron().init(KEY)
    before = jax.tree.map(np.asarray, (attacker, start))
    fit_with_hook(perceptron(), *blobs, SGD, KEY, TrainingHook(2, (0.25,), whiten), attacker, start=start)
    compiled = compiled_programs()
    fit_with_hook(perceptron(), *blobs, SGD, KEY, TrainingHook(2, (0.25,), whiten), attacker, start=start)
    assert compiled_programs() == compiled
    jax.tree.map(assert_array_equal, before, (attacker, start))


def test_training_goes_on_from_given_variables(blobs):
    once = fit(perceptron(), *blobs, SGD, KEY)
    still = fit(perceptron(), *blobs, FitConfig(1, 40, "sgd", 1e-9), KEY, start=once)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), once, still)
