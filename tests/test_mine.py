"""The estimator of mutual information against closed forms, and its bias-corrected gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from bdjax.defenses import _mine

KEY = jax.random.key(0)


def gaussians(key, rho, count):
    """z, x [count, 1] with correlation rho, and an independent z'."""
    z, noise, other = jax.random.normal(key, (3, count, 1))
    return z, rho * z + (1 - rho**2) ** 0.5 * noise, other


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.7, -0.9])
def test_it_recovers_the_mutual_information_of_correlated_gaussians(rho):
    params = _mine.init(KEY, 1, 1, 32)
    adam = optax.adam(3e-3)

    def step(carry, key):
        params, moments, average = carry
        z, x, other = gaussians(key, rho, 500)

        def loss(params):
            joint, marginal = _mine.scores(params, z, x), _mine.scores(params, other, x)
            log_average = _mine.update_log_average(average, marginal, jnp.float32(0.05))
            return _mine.surrogate_loss(joint, marginal, log_average), log_average

        gradient, average = jax.grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            update, moments = adam.update(gradient, moments)
        return (optax.apply_updates(params, update), moments, average), None

    start = (params, adam.init(params), jnp.float32(0))
    run = jax.jit(lambda start: jax.lax.scan(step, start, jax.random.split(KEY, 600))[0][0])
    trained, (z, x, other) = run(start), gaussians(jax.random.key(9), rho, 100_000)
    estimate, before = (_mine.lower_bound(_mine.scores(p, z, x), _mine.scores(p, other, x)) for p in (trained, params))
    assert_allclose(estimate, -0.5 * np.log(1 - rho**2), rtol=0.1)
    assert before < 0.1 * estimate
    independent = _mine.lower_bound(
        _mine.scores(trained, jax.random.permutation(KEY, z), x), _mine.scores(trained, other, x)
    )
    assert independent < 0  # independent vectors have no mutual information


def test_the_bound_is_exact_for_the_true_ratio():
    """With T = log p(x, z) / (p(x) p(z)) of Gaussians, with an arbitrary constant added."""
    rho = 0.6
    z, x, other = gaussians(KEY, rho, 400_000)

    def ratio(z, x):
        return (-(z**2 - 2 * rho * z * x + x**2) / (2 * (1 - rho**2)) + (z**2 + x**2) / 2)[:, 0] + 3

    assert_allclose(_mine.lower_bound(ratio(z, x), ratio(other, x)), -0.5 * np.log(1 - rho**2), rtol=0.02)


def test_the_network_equals_a_plain_computation():
    params = _mine.init(KEY, 3, 2, 5)
    z, x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    x = x[:, :2]
    params = {name: jnp.asarray(p + 0.3) if p.ndim == 1 else p for name, p in params.items()}

    def leaky(values):
        return np.where(values > 0, values, 0.2 * values)

    n = {name: np.asarray(p, np.float64) for name, p in params.items()}
    hidden = leaky(z @ n["first"] + x @ n["second"] + n["inner"])
    hidden = leaky(hidden @ n["middle"] + n["middle_bias"])
    expected = leaky(hidden @ n["last"] + n["last_bias"])[:, 0]
    assert (expected < 0).any()
    assert_allclose(_mine.scores(params, jnp.asarray(z), jnp.asarray(x)), expected, rtol=1e-5)


def test_the_gradient_is_corrected_by_the_moving_average():
    """Gradient of the loss: −1/n for each joint value, exp(T) / (n · average) for each marginal one."""
    joint, marginal = jnp.array([0.5, -1.0]), jnp.array([0.2, 1.0, -0.4])
    average = _mine.update_log_average(jnp.log(jnp.float32(2.0)), marginal, jnp.float32(0.25))
    values = np.exp(np.array([0.2, 1.0, -0.4]))
    expected = 0.75 * 2 + 0.25 * values.mean()
    assert_allclose(jnp.exp(average), expected, rtol=1e-6)
    of_joint, of_marginal = jax.grad(_mine.surrogate_loss, (0, 1))(joint, marginal, average)
    assert_allclose(of_joint, [-0.5, -0.5])
    assert_allclose(of_marginal, values / (3 * expected), rtol=1e-6)
    batch = _mine.update_log_average(
        jnp.float32(7.0), marginal, jnp.float32(1.0)
    )  # the batch alone gives the plain gradient
    plain = jax.grad(lambda m: -_mine.lower_bound(joint, m))(marginal)
    assert_allclose(jax.grad(_mine.surrogate_loss, 1)(joint, marginal, batch), plain, rtol=1e-6)


def test_large_values_do_not_overflow():
    large = jnp.array([200.0, 199.0])
    average = _mine.update_log_average(jnp.float32(0), large, jnp.float32(0.5))
    assert_allclose(average, 200 + np.log((1 + np.exp(-1)) / 2 * 0.5), rtol=1e-5)
    assert np.isfinite(_mine.lower_bound(large, large)) and np.isfinite(_mine.surrogate_loss(large, large, average))
