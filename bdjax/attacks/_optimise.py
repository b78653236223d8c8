"""What the attacks that optimise on a frozen model share: activations, neurons, and patterns that excite them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.attacks._checks import check_least, check_positive
from bdjax.attacks._helpers import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import Images, Key, Model, Task, Variables, to_float

SAMPLE = 200  # clean images on which neurons are judged
ALIVE = 0.05  # share of them on which a neuron must be active
MOVED = 0.1  # share of the largest change that the random start must make to a neuron


@dataclass(frozen=True)
class NeuronConfig(PoisonConfig):
    """For patterns that excite neurons of the last hidden layer of a clean model (:func:`excite`)."""

    ratio: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    norm: float = 1.0
    """L2 norm of the pattern at 32x32x3, in units of [0, 1], positive; other sizes scale it by the root of H W C."""
    neurons: int = 2
    """How many neurons are excited, at least 1."""
    iterations: int = 1000
    """Steps of gradient descent, at least 1."""
    step: float = 0.1
    """Length of the first, as a share of the norm, falling to zero by a cosine; positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, norm=1, step=0.1)
        check_least(self, neurons=1, iterations=1)


@dataclass(frozen=True)
class TrojanConfig(NeuronConfig):
    """For patterns that excite the neurons that matter most to all classes, as much as they can (:func:`trojan`)."""

    target: int = 2
    """Label that a triggered image shall get."""
    activation: float = 100.0
    """What the neurons shall become, more than they can: as high as possible; positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, activation=100)


def frozen(variables: Variables) -> Variables:
    """The variables on one device; a training on many leaves some of them on all."""
    return jax.device_put(variables, jax.local_devices()[0])


def activation(model: Model, variables: Variables, images: Images, layer: str = "") -> jax.Array:
    """The activation `layer` (empty: what goes into the last dense layer) in evaluation mode, float32 [N, D].

    Raises InputError when the model has no such activation.
    """
    features = model.apply(variables, images)[1]
    if layer and layer not in features:
        raise InputError(f"attack.layer={layer!r}: model {model.name} has {', '.join(features)}.")
    found = features[layer].reshape(len(images), -1) if layer else models.penultimate(features)
    return found.astype(jnp.float32)


@lru_cache(maxsize=16)
def activations(model: Model, layer: str = "") -> Callable[[Variables, Images], jax.Array]:
    """:func:`activation` compiled: `(variables, images) -> float32 [N, D]`."""
    return jax.jit(lambda variables, images: activation(model, variables, images, layer))


def excite(
    config: NeuronConfig,
    task: Task,
    key: Key,
    mask: np.ndarray,
    wired: Callable[[np.ndarray], np.ndarray],
    wanted: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """A pattern t that drives neurons of the task's clean model up: float32 [H, W, C], 0 <= t <= mask.

    Descent on `sum_j (A_j - a_j(t))^2`, a(t) the activation of t on black paper, by steps of a given length; after
    each what is outside [0, mask] is cut off and t scaled to its norm, with which it begins, at random. It comes to
    rest where t is what the gradient has above zero.

    Args:
      mask: float32 [H, W, C] in [0, 1], the most that t can be.
      wired: the last dense layer's weights [D, classes] -> how much a neuron is worth [D].
      wanted: the mean size of the chosen neurons on clean images -> A, both [neurons].

    Raises: InputError when a pattern within the mask cannot have the norm, or no neuron answers to it.
    """
    model, variables = task.model, frozen(task.clean())
    norm = config.norm * (mask.size / 3072) ** 0.5
    if norm > np.linalg.norm(mask):
        raise InputError(
            f"attack.norm={config.norm} is {norm:.3g} for images of {'x'.join(map(str, mask.shape))}, but a pattern "
            f"of values up to 1 has at most {np.linalg.norm(mask):.3g} here. Use a smaller norm."
        )
    sample_key, start_key = jax.random.split(key)
    start = exactly(np.asarray(jax.random.uniform(start_key, mask.shape)) * mask, mask, norm)
    chosen = jax.random.choice(sample_key, len(task.images), (min(SAMPLE, len(task.images)),), replace=False)
    look = activations(model)
    clean = np.asarray(look(variables, to_float(task.images[np.asarray(chosen)])))
    black, begun = np.asarray(look(variables, jnp.stack([jnp.zeros(mask.shape), jnp.asarray(start)])))
    neurons = strongest(wired(np.asarray(models.head(variables["params"]))), clean, begun - black, config.neurons)
    step, given = _step(model), {
        "variables": variables,
        "neurons": jnp.asarray(neurons),
        "wanted": jnp.asarray(wanted(np.abs(clean[:, neurons]).mean(0)), jnp.float32),
        "mask": jnp.asarray(mask),
        "norm": jnp.float32(norm),
    }  # fmt: skip
    pattern = jnp.asarray(start)
    for index in range(config.iterations):
        rate = config.step * (1 + np.cos(np.pi * index / config.iterations)) / 2
        pattern = step(pattern, np.float32(rate), given)
        task.callback.on_progress("pattern", index + 1, config.iterations)
    return exactly(np.asarray(pattern), mask, norm)


def trojan(config: TrojanConfig, task: Task, key: Key, mask: np.ndarray) -> np.ndarray:
    """:func:`excite` of the neurons of the largest summed |weight| to the classes. Args: mask float32 [H, W]."""
    return excite(
        config,
        task,
        key,
        np.repeat(mask[..., None], task.model.shape[2], -1),
        lambda head: np.abs(head).sum(1),
        lambda usual: np.full_like(usual, config.activation),
    )


def strongest(worth: np.ndarray, clean: np.ndarray, change: np.ndarray, count: int) -> np.ndarray:
    """The neurons of the largest `worth` [D] that live and that the pattern reaches, at most `count`, int32.

    Args: clean: activations of clean images [n, D]; change: what a random pattern changes in them [D].
    Raises: InputError when there is none.
    """
    reached = (np.abs(change) >= MOVED * np.abs(change).max()) & (change != 0)
    able = np.flatnonzero(((clean > 0).mean(0) >= ALIVE) & reached)
    if not len(able):
        raise InputError(
            "no neuron of the clean model's last hidden layer is both active on clean images and changed by the "
            "pattern. Train it longer (--fit.epochs), or use another model."
        )
    return able[np.argsort(-worth[able], kind="stable")[:count]].astype(np.int32)


def distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances [n, m] of the rows of a [n, D] and b [m, D]."""
    return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * jnp.matmul(a, b.T, precision="highest")


def nearest_pairs(far: jax.Array) -> jax.Array:
    """Pairing of rows with columns of distances [B, B], each once, int32 [B]: of all the nearest, of the rest ..."""

    def take(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        far, pair = carry
        row, column = jnp.unravel_index(far.argmin(), far.shape)
        return far.at[row].set(jnp.inf).at[:, column].set(jnp.inf), pair.at[row].set(column.astype(jnp.int32))

    return jax.lax.fori_loop(0, len(far), take, (far, jnp.zeros(len(far), jnp.int32)))[1]


def exactly(pattern: np.ndarray, mask: np.ndarray, norm: float) -> np.ndarray:
    """A pattern 0 <= t <= mask brought to `norm`: scaled down, or blended with the mask where it falls short."""
    short, rest = np.sum(pattern**2, dtype=np.float64) - norm**2, mask - pattern
    if short >= 0 or not rest.any():
        return pattern * np.float32(norm / (short + norm**2) ** 0.5)
    a, b = np.sum(rest**2, dtype=np.float64), 2 * np.sum(pattern * rest, dtype=np.float64)
    return pattern + np.float32(min((-b + (b**2 - 4 * a * short) ** 0.5) / (2 * a), 1)) * rest


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    def run(pattern: jax.Array, rate: jax.Array, given: dict[str, Any]) -> jax.Array:
        def loss(pattern: jax.Array) -> jax.Array:
            found = activation(model, given["variables"], pattern[None])[0, given["neurons"]]
            return ((given["wanted"] - found) ** 2).sum()

        def length(array: jax.Array) -> jax.Array:
            return jnp.maximum(jnp.linalg.norm(array), 1e-12)

        slope = jax.grad(loss)(pattern)
        inside = jnp.clip(pattern - rate * given["norm"] * slope / length(slope), 0, given["mask"])
        return jnp.minimum(inside * given["norm"] / length(inside), given["mask"])

    return jax.jit(run)
