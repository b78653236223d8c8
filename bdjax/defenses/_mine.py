"""MINE: a neural estimate of the mutual information of two random vectors from samples.

M. I. Belghazi, A. Baratin, S. Rajeswar, S. Ozair, Y. Bengio, A. Courville and R. D. Hjelm, "Mutual Information Neural
Estimation", ICML 2018, arXiv:1801.04062.

Donsker-Varadhan bound: for any function T, with (z, x) drawn jointly and z' drawn independently of x,

    I(Z; X) >= E T(z, x) − log E exp T(z', x)

with equality at T = log p(z, x) / (p(z) p(x)) + constant. The gradient of the logarithm is biased on a batch, because
the mean inside it is the mean of that batch. MINE therefore divides by a moving average of the mean
(:func:`surrogate_loss`), which is stored as its logarithm. T is the network of MESA's release: one matrix for z and one
for x, one bias, two more dense layers, and LeakyReLU 0.2 after all three.

Deviations:

- Weights are initialised by LeCun's variance scaling and biases by zero (ours).
"""

from typing import Any

import jax
import jax.numpy as jnp

from bdjax.types import Key


def init(key: Key, first: int, second: int, hidden: int) -> dict[str, jax.Array]:
    """Initialise the parameters of T.

    Args:
      key: random key of the weights.
      first: size of z.
      second: size of x.
      hidden: units of the hidden layers.

    Returns:
      The parameters, float32 arrays by name.
    """
    shapes = {"first": (first, hidden), "second": (second, hidden), "middle": (hidden, hidden), "last": (hidden, 1)}
    kernel = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(shapes))
    params = {name: kernel(k, shape, jnp.float32) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    biases = {"inner": jnp.zeros(hidden), "middle_bias": jnp.zeros(hidden), "last_bias": jnp.zeros(1)}
    return params | biases


def scores(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
    """Evaluate T(z, x) for each pair of rows.

    Args:
      params: parameters of T.
      z: float32 [N, first].
      x: float32 [N, second].

    Returns:
      float32 [N].
    """
    h = jax.nn.leaky_relu(z @ params["first"] + x @ params["second"] + params["inner"], 0.2)
    h = jax.nn.leaky_relu(h @ params["middle"] + params["middle_bias"], 0.2)
    return jax.nn.leaky_relu(h @ params["last"] + params["last_bias"], 0.2)[:, 0]


def lower_bound(joint: jax.Array, marginal: jax.Array) -> jax.Array:
    """Donsker-Varadhan bound in nats, from T [N] on jointly and T [N] on independently drawn pairs."""
    return joint.mean() - _log_mean_exp(marginal)


def update_log_average(log_average: jax.Array, marginal: jax.Array, rate: Any) -> jax.Array:
    """Update the moving average of E exp T(z', x) by one batch, in the log domain.

    Args:
      log_average: logarithm of the moving average, a scalar.
      marginal: T [N] on independently drawn pairs.
      rate: weight of the batch, in (0, 1].

    Returns:
      The new logarithm, a scalar.
    """
    return jnp.logaddexp(jnp.log1p(-rate) + log_average, jnp.log(rate) + _log_mean_exp(marginal))


def surrogate_loss(joint: jax.Array, marginal: jax.Array, log_average: jax.Array) -> jax.Array:
    """Loss of T whose gradient is that of −:func:`lower_bound`, with the moving average as the denominator.

    Args:
      joint: T [N] on jointly drawn pairs.
      marginal: T [N] on independently drawn pairs.
      log_average: logarithm of the moving average.

    Returns:
      The loss, a scalar.
    """
    return jnp.exp(marginal - jax.lax.stop_gradient(log_average)).mean() - joint.mean()


def _log_mean_exp(values: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(values) - jnp.log(jnp.float32(len(values)))
