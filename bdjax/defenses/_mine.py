"""MINE: mutual information of two random vectors from samples, by a small network (Belghazi et al., ICML 2018).

Donsker-Varadhan: for any function T, with (z, x) drawn together and z' drawn apart from x,

    I(Z; X) >= E T(z, x) − log E exp T(z', x)

with equality at T = log p(z, x) / (p(z) p(x)) + constant. A batch's gradient of the log is biased, for the mean under
it is the batch's own; MINE divides by a moving average of that mean instead (:func:`surrogate`), kept as its logarithm.
T is that of MESA's release: z and x each through a matrix of its own, one bias, two more dense layers, LeakyReLU 0.2
after all three. It starts with variance-scaled weights and zero biases (ours).
"""

from typing import Any

import jax
import jax.numpy as jnp

from bdjax.types import Key


def init(key: Key, first: int, second: int, hidden: int) -> dict[str, jax.Array]:
    """Parameters of T for vectors of `first` and `second` numbers."""
    shapes = {"first": (first, hidden), "second": (second, hidden), "middle": (hidden, hidden), "last": (hidden, 1)}
    kernel = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(shapes))
    params = {name: kernel(k, shape, jnp.float32) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    biases = {"inner": jnp.zeros(hidden), "middle_bias": jnp.zeros(hidden), "last_bias": jnp.zeros(1)}
    return params | biases


def scores(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
    """T(z, x) of each pair of rows, [N]."""
    h = jax.nn.leaky_relu(z @ params["first"] + x @ params["second"] + params["inner"], 0.2)
    h = jax.nn.leaky_relu(h @ params["middle"] + params["middle_bias"], 0.2)
    return jax.nn.leaky_relu(h @ params["last"] + params["last_bias"], 0.2)[:, 0]


def bound(joint: jax.Array, marginal: jax.Array) -> jax.Array:
    """The Donsker-Varadhan bound in nats, of T [N] on pairs drawn together and T [N] on pairs drawn apart."""
    return joint.mean() - _log_mean_exp(marginal)


def follow(log_average: jax.Array, marginal: jax.Array, rate: Any) -> jax.Array:
    """The log of the moving average of E exp T(z', x), one batch later; `rate` is the batch's share."""
    return jnp.logaddexp(jnp.log1p(-rate) + log_average, jnp.log(rate) + _log_mean_exp(marginal))


def surrogate(joint: jax.Array, marginal: jax.Array, log_average: jax.Array) -> jax.Array:
    """What T descends: its gradient is that of −:func:`bound` with the moving average under the fraction."""
    return jnp.exp(marginal - jax.lax.stop_gradient(log_average)).mean() - joint.mean()


def _log_mean_exp(values: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(values) - jnp.log(jnp.float32(len(values)))
