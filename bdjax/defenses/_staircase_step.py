"""The training step of max-entropy staircases: one update of every T, every generator and every position distribution.

All networks have a leading axis [P] over pairs (label, threshold); see :mod:`bdjax.defenses._staircase` for the losses.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.defenses import _mine
from bdjax.defenses._pool import draw_corner, stamp_one
from bdjax.engine import parallel
from bdjax.engine.optimizer import take_step
from bdjax.types import Key, Model, to_float


class Static(NamedTuple):
    """The Config fields that the compiled program depends on."""

    form: str
    size: int
    noise_size: int
    hidden: int


def trigger_shape(shape: tuple[int, int, int], static: Static) -> tuple[int, int, int]:
    """Return the shape of a trigger for images of `shape` (H, W, C): that of the image, or of a square patch."""
    return shape if static.form == "additive" else (static.size, static.size, shape[2])


def as_triggers(values: jax.Array, shape: tuple[int, int, int], static: Static, hyper: Any) -> jax.Array:
    """Convert the output of a generator to triggers.

    Args:
      values: float32 [..., h * w * C] in [0, 1].
      shape: (H, W, C) of an image.
      static: the fields that the program depends on.
      hyper: hyper-parameters, among them "strength".

    Returns:
      Triggers, float32 [..., h, w, C].
    """
    if static.form == "additive":
        values = hyper["strength"] * (2 * values - 1)
    return values.reshape(*values.shape[:-1], *trigger_shape(shape, static))


def generator_network(shape: tuple[int, int, int], static: Static) -> models.Generator:
    """Return the network that maps noise to the values of a trigger."""
    return models.sampler(int(np.prod(trigger_shape(shape, static))), static.noise_size, static.hidden)


class _Draws(NamedTuple):
    """The random numbers of one step, for P pairs and B images."""

    z: jax.Array
    """float32 [P, B, noise_size], input of the generators."""
    independent_z: jax.Array
    """float32 [P, B, noise_size], noise independent of the triggers."""
    trigger_noise: jax.Array
    """float32 [P, B, h, w, C], standard normal noise on the triggers."""
    corners: jax.Array
    """int32 [P, B, 2], first row and column of each patch."""


class _Inputs(NamedTuple):
    """What the losses of one step have in common."""

    model: Model
    static: Static
    images: jax.Array
    """float32 [B, H, W, C] in [0, 1]."""
    draws: _Draws
    constants: Any
    axis: str | None


@lru_cache(maxsize=16)
def staircase_step(model: Model, static: Static) -> Callable:
    """Return one step of every T, then of every generator and its position distribution, in the engine's form."""
    generator = generator_network(model.shape, static)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = to_float(constants["images"][batch["index"]])
        draws = _draw(model.shape, static, constants["pairs"]["id"], state["position_logits"], batch["key"])
        inputs = _Inputs(model, static, images, draws, constants, axis)
        generate = partial(_generate, generator, state["batch_stats"], draws.z, axis)
        values = generate(state["params"])[0]
        update = partial(_adam, state=state, hyper=constants["hyper"], axis=axis)

        estimator_loss = partial(_estimator_loss, values=values, log_average=state["log_average"], inputs=inputs)
        gradient, log_average = jax.grad(estimator_loss, has_aux=True)(state["mine"])
        mine, mine_moments = update("mine", gradient)

        generator_loss = partial(_generator_loss, mine=mine, generate=generate, inputs=inputs)
        gradient, (stats, shortfall, metrics) = jax.grad(generator_loss, has_aux=True)(state["params"])
        params, params_moments = update("params", gradient)

        position_loss = partial(_position_loss, shortfall=jax.lax.stop_gradient(shortfall), inputs=inputs)
        gradient = jax.grad(position_loss)(state["position_logits"])
        position_logits, position_moments = update("position_logits", gradient, rate="place_rate")

        moments = {"mine": mine_moments, "params": params_moments, "position_logits": position_moments}
        after = {"params": params, "batch_stats": stats, "mine": mine, "position_logits": position_logits}
        return {**after, "log_average": log_average, "moments": moments}, metrics

    return step


def _draw(shape: tuple[int, int, int], static: Static, pair_ids: jax.Array, position_logits: Any, keys: Key) -> _Draws:
    """Draw the random numbers of one step, by the pair's id [P] and the image's key [B]."""
    noise_size, patch_shape = static.noise_size, trigger_shape(shape, static)

    def noises(pair: jax.Array, key: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
        normal = jax.random.normal(jax.random.fold_in(key, pair), (2 * noise_size + int(np.prod(patch_shape)),))
        z, independent_z = normal[:noise_size], normal[noise_size : 2 * noise_size]
        return z, independent_z, normal[2 * noise_size :].reshape(patch_shape)

    def corner(pair: jax.Array, logits: Any, key: Key) -> jax.Array:
        return draw_corner(logits, jax.random.fold_in(jax.random.fold_in(key, pair), 1))

    noise = jax.vmap(lambda pair: jax.vmap(partial(noises, pair))(keys))(pair_ids)
    corners = jax.vmap(lambda pair, logits: jax.vmap(partial(corner, pair, logits))(keys))
    return _Draws(*noise, corners(pair_ids, position_logits))


def _generate(
    generator: models.Generator, batch_stats: Any, z: jax.Array, axis: str | None, params: Any
) -> tuple[jax.Array, Any]:
    """Return the values of all triggers, float32 [P, B, h * w * C] in [0, 1], and the new BatchNorm statistics."""

    def generate_one(params: Any, stats: Any, z: jax.Array) -> tuple[jax.Array, Any]:
        return generator.apply({"params": params, "batch_stats": stats}, z, weight=jnp.ones(len(z)), axis_name=axis)

    return jax.vmap(generate_one)(params, batch_stats, z)


def _statistics(mine: Any, values: jax.Array, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    """Return T on jointly and on independently drawn pairs of all devices, each [P, B]."""
    scores, draws = jax.vmap(_mine.scores), inputs.draws
    joint, marginal = scores(mine, draws.z, values), scores(mine, draws.independent_z, values)
    return parallel.all_gather(joint.T, inputs.axis).T, parallel.all_gather(marginal.T, inputs.axis).T


def _estimator_loss(
    mine: Any, values: jax.Array, log_average: jax.Array, inputs: _Inputs
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of all T, and the logarithms of their moving averages."""
    joint, marginal = _statistics(mine, values, inputs)
    rate = inputs.constants["hyper"]["moving_average"]
    log_average = jax.vmap(_mine.update_log_average, (0, 0, None))(log_average, marginal, rate)
    return jax.vmap(_mine.surrogate_loss)(joint, marginal, log_average).sum(), log_average


def _generator_loss(params: Any, mine: Any, generate: Callable, inputs: _Inputs) -> tuple[jax.Array, Any]:
    """Return the loss of all generators (BAERASER, Eq. 2), their statistics, the shortfalls [P, B] and the metrics."""
    model, static, constants, draws = inputs.model, inputs.static, inputs.constants, inputs.draws
    hyper, pairs = constants["hyper"], constants["pairs"]
    values, stats = generate(params)
    information = jax.vmap(_mine.lower_bound)(*_statistics(mine, values, inputs))
    triggers = as_triggers(values, model.shape, static, hyper) + hyper["trigger_noise"] * draws.trigger_noise
    stamp_batch = jax.vmap(partial(stamp_one, static.form))
    stamped = jax.vmap(stamp_batch, (None, 0, 0))(inputs.images, triggers, draws.corners)
    logits = model.logits(constants["variables"], stamped.reshape(-1, *model.shape))
    logits = logits.reshape(*draws.z.shape[:2], -1).astype(jnp.float32)
    probability = jnp.take_along_axis(jax.nn.softmax(logits), pairs["label"][:, None, None], -1)[..., 0]
    shortfall = jnp.maximum(0, pairs["threshold"][:, None] - probability)
    hinge = parallel.all_gather(shortfall.T, inputs.axis).mean(0)
    loss = (hinge - hyper["mi_weight"] * information).sum()
    return loss, (stats, shortfall, {"loss": loss, "hinge": hinge, "information": information})


def _position_loss(position_logits: Any, shortfall: jax.Array, inputs: _Inputs) -> jax.Array:
    """Return the score-function loss of all position distributions, with their entropy as a bonus."""
    corners, axis = inputs.draws.corners, inputs.axis
    log_probabilities = [jax.nn.log_softmax(logits) for logits in position_logits]
    of_corner = [jnp.take_along_axis(log, corners[..., i], 1) for i, log in enumerate(log_probabilities)]
    log_probability = of_corner[0] + of_corner[1]
    shortfall, log_probability = (parallel.all_gather(leaf.T, axis).T for leaf in (shortfall, log_probability))
    centred = shortfall - shortfall.mean(1, keepdims=True)  # the mean is the baseline that reduces variance
    score = (centred * log_probability).mean(1)
    entropy = jnp.stack([-(jnp.exp(log) * log).sum(1) for log in log_probabilities]).sum(0)
    return (score - inputs.constants["hyper"]["place_entropy"] * entropy).sum()


def _adam(name: str, gradient: Any, state: Any, hyper: Any, axis: str | None, rate: str = "generator_rate") -> Any:
    """Return state[name] and its moments after one step of Adam with the learning rate hyper[rate]."""
    gradient = parallel.average(gradient, axis)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        update, moments = optax.scale_by_adam(b1=hyper["adam_beta"]).update(gradient, state["moments"][name])
    return take_step(state[name], update, hyper[rate]), moments
