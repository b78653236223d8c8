"""FT-SAM: its ascent, label smoothing and learning rates by hand, and two steps against a direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tuned import KEY, MODEL, VICTIM, view_of

from bdjax.defenses import ft_sam
from bdjax.types import Model, Victim


def test_ascent_is_proportional_to_the_weights():
    params = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([0.5])}
    gradient = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([-2.0])}
    found = ft_sam.ascent_step(params, gradient, 2.0, True)  # |w| g is 3, 8, -1
    assert_allclose(found["a"], 2 * np.array([9, 32]) / 74**0.5, rtol=1e-6)
    assert_allclose(found["b"], 2 * np.array([-0.5]) / 74**0.5, rtol=1e-6)
    plain = ft_sam.ascent_step(params, gradient, 2.0, False)
    assert_allclose(plain["a"], 2 * np.array([1, 2]) / 3, rtol=1e-6)
    assert_allclose(plain["b"], 2 * np.array([-2]) / 3, rtol=1e-6)


def test_label_smoothing_is_spread_evenly_over_the_other_classes():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    by_hand = [-(0.9 * np.log(0.7) + 0.05 * np.log(0.2) + 0.05 * np.log(0.1)),
               -(0.05 * np.log(0.25) + 0.05 * np.log(0.25) + 0.9 * np.log(0.5))]  # fmt: skip
    assert_allclose(ft_sam.smoothed_cross_entropy(logits, jnp.array([0, 2]), 0.1), np.mean(by_hand), rtol=1e-6)


def test_both_readings_of_the_cosine():
    batches = ft_sam.learning_rates(ft_sam.Config(epochs=30), 10)
    assert batches.shape == (30, 10)
    assert_allclose(batches.reshape(-1)[[0, 50, 100, 150, 200, 299]][:5], [0.01, 0.005, 0, 0.005, 0.01], atol=1e-9)
    epochs = ft_sam.learning_rates(ft_sam.Config(epochs=4, cosine="epochs"), 3)
    assert_allclose(epochs[:, 0], 0.005 * (1 + np.cos(np.pi * np.arange(4) / 4)), rtol=1e-6)
    assert (epochs == epochs[:, :1]).all()
    assert (ft_sam.learning_rates(ft_sam.Config(epochs=2, cosine="off"), 3) == np.float32(0.01)).all()


def _tagged_apply(variables, images, train=False, keys=None, axis_name=None):
    logits, features, _ = MODEL.apply(variables, images)
    return logits, features, {"seen": variables["params"]["body"].sum()} if train else variables["batch_stats"]


TAGGED = Model("tagged", MODEL.shape, 4, MODEL.init, _tagged_apply)
"""The perceptron with a statistic that identifies the parameters of the last forward pass in training mode."""


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [True, False])
def test_two_steps_of_ft_sam_equal_a_plain_computation(blobs, adaptive):
    config = ft_sam.Config(
        epochs=2, batch_size=40, rho=0.3, adaptive=adaptive, augment="none", weight_decay=0.01, half_period=3,
        learning_rate=0.1, smoothing=0.2,
    )  # fmt: skip
    start = VICTIM.variables["params"]
    victim = Victim(TAGGED, {"params": start, "batch_stats": {"seen": jnp.float32(0)}})
    out = ft_sam.purify(config, victim, view_of(blobs), KEY)
    images, labels = jnp.asarray(blobs[0][:40], jnp.float32) / 255, blobs[1][:40]
    wanted = np.full((40, 4), 0.2 / 3, np.float32)
    wanted[np.arange(40), labels] = 0.8

    def loss(params):
        logits = MODEL.logits({"params": params, "batch_stats": {}}, images)
        return -(wanted * jax.nn.log_softmax(logits)).sum(1).mean()

    params, momentum = start, jax.tree.map(jnp.zeros_like, start)
    for rate in (0.1, 0.1 * (1 + np.cos(np.pi / 3)) / 2):
        first, before = jax.grad(loss)(params), params
        size = jax.tree.map(jnp.abs, params) if adaptive else jax.tree.map(jnp.ones_like, params)
        length = sum(float(((s * g) ** 2).sum()) for s, g in zip(*map(jax.tree.leaves, (size, first)), strict=True))
        there = jax.tree.map(lambda p, s, g, n=length**0.5: p + 0.3 * s**2 * g / n, params, size, first)
        second = jax.tree.map(lambda g, p: g + 0.01 * p, jax.grad(loss)(there), params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, second)
        params = jax.tree.map(lambda p, m, r=rate: p - r * m, params, momentum)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), out["params"], params)
    # statistics are those of the first pass
    assert float(out["batch_stats"]["seen"]) == pytest.approx(float(before["body"].sum()), abs=1e-4)
