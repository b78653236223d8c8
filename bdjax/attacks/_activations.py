"""Optimisation on a trained model with fixed weights: activations, choice of neurons, patterns that activate them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.attacks._checks import check_least, check_positive
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import Images, Key, Model, Task, Variables, to_float

SAMPLE = 200  # clean images on which activations are measured
ALIVE = 0.05  # share of them on which a chosen neuron must be positive
MOVED = 0.1  # share of the largest change by the initial pattern that a chosen neuron must reach


@dataclass(frozen=True)
class NeuronConfig(PoisonConfig):
    """Base of the Configs of attacks whose pattern activates neurons of the last hidden layer of a clean model."""

    ratio: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    norm: float = 1.0
    """L2 norm of the pattern at 32x32x3, in units of [0, 1], positive; other sizes scale it by the root of H W C."""
    neurons: int = 2
    """Number of neurons that the pattern activates, at least 1."""
    iterations: int = 1000
    """Steps of gradient descent, at least 1."""
    step: float = 0.1
    """Length of the first step, as a share of the norm, positive; falls to zero as a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, norm=1, step=0.1)
        check_least(self, neurons=1, iterations=1)


@dataclass(frozen=True)
class TrojanConfig(NeuronConfig):
    """Base of the Configs of attacks whose pattern activates the neurons with the largest weights (see trojan_pattern).

    The desired activation is out of reach, so the activations become as large as possible.
    """

    target: int = 2
    """Label that the attacker wants for triggered images."""
    activation: float = 100.0
    """Desired activation of the neurons, positive; higher than they can reach."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, activation=100)


def to_one_device(variables: Variables) -> Variables:
    """Copy variables to the first device; training on several devices may leave them on all."""
    return jax.device_put(variables, jax.local_devices()[0])


def activation(model: Model, variables: Variables, images: Images, layer: str = "") -> jax.Array:
    """Compute one activation of a model in evaluation mode.

    Args:
      model: the model.
      variables: its variables.
      images: float32 [N, H, W, C] in [0, 1].
      layer: name of the activation; empty: the input of the last dense layer.

    Returns:
      float32 [N, D].

    Raises:
      InputError: when the model has no activation of that name.
    """
    features = model.apply(variables, images)[1]
    if layer and layer not in features:
        raise InputError(f"attack.layer={layer!r}: model {model.name} has {', '.join(features)}.")
    values = features[layer].reshape(len(images), -1) if layer else models.penultimate(features)
    return values.astype(jnp.float32)


@lru_cache(maxsize=16)
def compiled_activation(model: Model, layer: str = "") -> Callable[[Variables, Images], jax.Array]:
    """Compile :func:`activation` as `(variables, images) -> float32 [N, D]`."""
    return jax.jit(lambda variables, images: activation(model, variables, images, layer))


def optimise_pattern(
    config: NeuronConfig,
    task: Task,
    key: Key,
    mask: np.ndarray,
    neuron_scores: Callable[[np.ndarray], np.ndarray],
    desired: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Optimise a pattern t, 0 <= t <= mask, that activates neurons of the task's clean model.

    Minimises `sum_j (A_j - a_j(t))^2`, where a(t) is the activation of t on a black image, by steps along the
    normalised gradient whose length is prescribed. After each step t is clipped to [0, mask] and scaled to its norm;
    it starts as noise of that norm. It converges where t is proportional to the positive part of the negative gradient.

    Args:
      config: norm, number of neurons, steps.
      task: training set and model.
      key: random key.
      mask: float32 [H, W, C] in [0, 1], upper bound of t.
      neuron_scores: weights of the last dense layer [D, classes] -> score of each neuron [D]; the highest are chosen.
      desired: mean absolute activation of the chosen neurons on clean images -> A, both [neurons].

    Returns:
      float32 [H, W, C].

    Raises:
      InputError: when no pattern within the mask has the norm, or no neuron reacts to the pattern.
    """
    model, variables = task.model, to_one_device(task.clean())
    norm = config.norm * (mask.size / 3072) ** 0.5
    if norm > np.linalg.norm(mask):
        raise InputError(
            f"attack.norm={config.norm} is {norm:.3g} for images of {'x'.join(map(str, mask.shape))}, but a pattern "
            f"of values up to 1 has at most {np.linalg.norm(mask):.3g} here. Use a smaller norm."
        )
    sample_key, start_key = jax.random.split(key)
    start = scale_to_norm(np.asarray(jax.random.uniform(start_key, mask.shape)) * mask, mask, norm)
    chosen = jax.random.choice(sample_key, len(task.images), (min(SAMPLE, len(task.images)),), replace=False)
    activate = compiled_activation(model)
    clean = np.asarray(activate(variables, to_float(task.images[np.asarray(chosen)])))
    black, initial = np.asarray(activate(variables, jnp.stack([jnp.zeros(mask.shape), jnp.asarray(start)])))
    scores = neuron_scores(np.asarray(models.head(variables["params"])))
    neurons = strongest_neurons(scores, clean, initial - black, config.neurons)
    step, constants = _step(model), {
        "variables": variables,
        "neurons": jnp.asarray(neurons),
        "desired": jnp.asarray(desired(np.abs(clean[:, neurons]).mean(0)), jnp.float32),
        "mask": jnp.asarray(mask),
        "norm": jnp.float32(norm),
    }  # fmt: skip
    pattern = jnp.asarray(start)
    for index in range(config.iterations):
        rate = config.step * (1 + np.cos(np.pi * index / config.iterations)) / 2
        pattern = step(pattern, np.float32(rate), constants)
        task.callback.on_progress("pattern", index + 1, config.iterations)
    return scale_to_norm(np.asarray(pattern), mask, norm)


def trojan_pattern(config: TrojanConfig, task: Task, key: Key, mask: np.ndarray) -> np.ndarray:
    """Optimise a pattern for the neurons with the largest sum of absolute weights to the classes.

    Args:
      config: norm, desired activation, number of neurons, steps.
      task: training set and model.
      key: random key.
      mask: float32 [H, W] in [0, 1], upper bound of the pattern.

    Returns:
      float32 [H, W, C], see :func:`optimise_pattern`.

    Raises:
      InputError: when no pattern within the mask has the norm, or no neuron reacts to the pattern.
    """
    return optimise_pattern(
        config,
        task,
        key,
        np.repeat(mask[..., None], task.model.shape[2], -1),
        lambda head: np.abs(head).sum(1),
        lambda means: np.full_like(means, config.activation),
    )


def strongest_neurons(scores: np.ndarray, clean: np.ndarray, change: np.ndarray, count: int) -> np.ndarray:
    """Choose the neurons with the highest scores among those that are active and that the pattern changes.

    Args:
      scores: [D], one per neuron.
      clean: [n, D], activations of clean images; a neuron is active if it is positive on a share ALIVE of them.
      change: [D], change of the activations by a random pattern.
      count: number of neurons.

    Returns:
      int32 [at most count], indices.

    Raises:
      InputError: when no neuron qualifies.
    """
    changed = (np.abs(change) >= MOVED * np.abs(change).max()) & (change != 0)
    eligible = np.flatnonzero(((clean > 0).mean(0) >= ALIVE) & changed)
    if not len(eligible):
        raise InputError(
            "no neuron of the clean model's last hidden layer is both active on clean images and changed by the "
            "pattern. Train it longer (--fit.epochs), or use another model."
        )
    return eligible[np.argsort(-scores[eligible], kind="stable")[:count]].astype(np.int32)


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the squared distances [n, m] between the rows of a [n, D] and of b [m, D]."""
    return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * jnp.matmul(a, b.T, precision="highest")


def nearest_pairs(distances: jax.Array) -> jax.Array:
    """Pair rows and columns of distances [B, B] greedily, the nearest pair first: column of each row, int32 [B]."""

    def pair_nearest(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        distances, pairs = carry
        row, column = jnp.unravel_index(distances.argmin(), distances.shape)
        unpaired = distances.at[row].set(jnp.inf).at[:, column].set(jnp.inf)
        return unpaired, pairs.at[row].set(column.astype(jnp.int32))

    return jax.lax.fori_loop(0, len(distances), pair_nearest, (distances, jnp.zeros(len(distances), jnp.int32)))[1]


def scale_to_norm(pattern: np.ndarray, mask: np.ndarray, norm: float) -> np.ndarray:
    """Scale a pattern down to an L2 norm, or, where it is too small, blend it with its mask.

    Args:
      pattern: [H, W, C], 0 <= pattern <= mask.
      mask: [H, W, C], upper bound.
      norm: the L2 norm.

    Returns:
      [H, W, C], within the same bounds, of that norm; the mask itself where its norm is smaller.
    """
    excess, margin = np.sum(pattern**2, dtype=np.float64) - norm**2, mask - pattern
    if excess >= 0 or not margin.any():
        return pattern * np.float32(norm / (excess + norm**2) ** 0.5)
    a, b = np.sum(margin**2, dtype=np.float64), 2 * np.sum(pattern * margin, dtype=np.float64)
    return pattern + np.float32(min((-b + (b**2 - 4 * a * excess) ** 0.5) / (2 * a), 1)) * margin


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """Compile a step of :func:`optimise_pattern`."""

    def run(pattern: jax.Array, rate: jax.Array, constants: dict[str, Any]) -> jax.Array:
        def loss(pattern: jax.Array) -> jax.Array:
            activations = activation(model, constants["variables"], pattern[None])[0, constants["neurons"]]
            return ((constants["desired"] - activations) ** 2).sum()

        def length(array: jax.Array) -> jax.Array:
            return jnp.maximum(jnp.linalg.norm(array), 1e-12)

        gradient = jax.grad(loss)(pattern)
        step = rate * constants["norm"] * gradient / length(gradient)
        clipped = jnp.clip(pattern - step, 0, constants["mask"])
        return jnp.minimum(clipped * constants["norm"] / length(clipped), constants["mask"])

    return jax.jit(run)
