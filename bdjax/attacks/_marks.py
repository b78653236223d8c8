"""Marks: a small square, optimised on a model that is there, and fine-tuning that teaches the model to answer to it.

What TrojanNN and IMC share. A mark k holds values in [0, 1] and stands at one place of all images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.attacks._helpers import PoisonConfig, fit_key, put, relabelled
from bdjax.attacks._optimise import activation, activations
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import Arrays, Batch, Images, Key, Model, SampleInfo, Task, TrainingHook, Variables, to_float

SAMPLE = 500  # clean images on which neurons must be active


@dataclass(frozen=True)
class MarkConfig(PoisonConfig):
    """The mark, how it is found, and how the model is taught."""

    ratio: float = 0.01
    """Share of the images of every epoch, drawn anew each time, that carry the mark, in (0, 1]."""
    exclude_target: bool = False
    """all_to_one: leave images of the target class out of the marked ones, which are fewer then."""
    size: int = 3
    """Side of the square in pixels, at least 1; BAERASER: 3, 5 and 7."""
    position: Literal["random", "top_left", "top_right", "bottom_left", "bottom_right"] = "random"
    """A corner, or a place drawn once for the model, the same for all images."""
    neurons: int = 2
    """How many neurons the mark shall drive, at least 1."""
    active: float = 0.05
    """Share of clean images on which a neuron must be positive to be chosen, in [0, 1]."""
    activation: float = 100.0
    """What a chosen neuron is driven to; above 0."""
    iterations: int = 1000
    """Steps of Adam on the mark before the model is touched, at least 1."""
    mark_rate: float = 0.1
    """Adam's learning rate for the mark, above 0; falls to 0 as a cosine over `iterations`."""
    epochs: int = 50
    """Epochs of fine-tuning, in place of --fit.epochs."""
    learning_rate: float = 0.01
    """Of the fine-tuning, by SGD with momentum 0.9, in place of --fit.learning-rate."""
    weight_decay: float = 5e-4
    """Of the fine-tuning, in place of --fit.weight-decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels == "clean":
            raise InputError("attack.labels must be all_to_one or all_to_all, got clean: the share is relabelled.")
        check_fields(
            self,
            "attack",
            (("size", "neurons", "iterations", "epochs"), "at least 1", lambda v: v >= 1),
            (("activation", "mark_rate", "learning_rate"), "positive", lambda v: v > 0),
        )
        if not 0 <= self.active <= 1:
            raise InputError(f"attack.active must be in [0, 1], got {self.active}. Use 0.05.")
        if self.weight_decay < 0:
            raise InputError(f"attack.weight_decay must not be negative, got {self.weight_decay}.")


def paste(images: Images, arrays: Arrays) -> Images:
    """Images [N, H, W, C] with arrays["mark"] [s, s, C] at arrays["place"] (row and column of its first pixel)."""
    return put(images, *(jnp.asarray(arrays[name]) for name in ("mark", "place")))


def squash(u: jax.Array) -> jax.Array:
    """The mark of free variables: k = (tanh(u) + 1) / 2."""
    return (jnp.tanh(u) + 1) / 2


def unsquash(mark: jax.Array) -> jax.Array:
    """u = atanh(0.999 (2 k - 1)), finite where k is 0 or 1."""
    return jnp.arctanh(0.999 * (2 * mark - 1))


def finished(config: MarkConfig, u: jax.Array) -> jax.Array:
    """The mark of u, rounded to k/255 if config.quantise."""
    return jnp.round(squash(u) * 255) / 255 if config.quantise else squash(u)


def optimised(config: MarkConfig, variables: Variables, task: Task, key: Key) -> Arrays:
    """TrojanNN's mark: {"mark": float32 [s, s, C] in [0, 1], "place": int32 [2], "neurons": int32 [n]}.

    Raises InputError when the mark does not fit the images, or too few neurons are active.
    """
    height, width, channels = task.model.shape
    last = height - config.size, width - config.size
    if min(last) < 0:
        raise InputError(f"attack.size={config.size} does not fit images of {height}x{width} pixels. Use a smaller.")
    variables = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), variables)  # of all devices, on one
    place_key, mark_key, sample_key = jax.random.split(key, 3)
    if config.position == "random":
        info = jax.random.randint(place_key, (2,), 0, jnp.array(last) + 1)
    else:
        info = jnp.array([last[0] * ("bottom" in config.position), last[1] * ("right" in config.position)])
    sample = jax.random.choice(sample_key, len(task.images), (min(SAMPLE, len(task.images)),), replace=False)
    features = activations(task.model)(variables, to_float(task.images[np.asarray(sample)]))
    neurons = jnp.asarray(choose(config, features, variables))
    u = unsquash(jax.random.uniform(mark_key, (config.size, config.size, channels)))
    state, step = (u, direction("adam").init(u)), _step(task.model)
    shared = {"place": info, "neurons": neurons, "activation": jnp.float32(config.activation)}
    for i in range(config.iterations):
        rate = config.mark_rate * (1 + np.cos(np.pi * i / config.iterations)) / 2
        state = step(state, variables, shared, jnp.float32(rate))
        task.callback.on_progress("mark", i + 1, config.iterations)
    mark = finished(config, state[0])
    return {"mark": np.asarray(mark), "place": np.asarray(info), "neurons": np.asarray(neurons)}


def choose(config: MarkConfig, features: Any, variables: Variables) -> np.ndarray:
    """The neurons with the largest sum of absolute outgoing weights, among those active enough: int32 [n].

    Args: features [N, D], of clean images; the last layer's weights [D, classes] stand under params["head"].
    """
    weights = models.head(variables["params"])
    often = np.flatnonzero((np.asarray(features) > 0).mean(0) >= config.active)
    if len(often) < config.neurons:
        raise InputError(
            f"attack.neurons={config.neurons}, but only {len(often)} of {features.shape[1]} are active on a share "
            f"attack.active={config.active} of the clean images. Use fewer neurons or a smaller share."
        )
    strength = np.abs(np.asarray(weights)).sum(1)[often]
    return often[np.argsort(-strength, kind="stable")[: config.neurons]].astype(np.int32)


@lru_cache(maxsize=8)
def _step(model: Model) -> Callable:
    """One step of Adam on u, towards the activation of the chosen neurons on a marked black image."""

    @jax.jit
    def step(state: Any, variables: Variables, shared: Any, rate: jax.Array) -> Any:
        def loss(u: jax.Array) -> jax.Array:
            image = paste(jnp.zeros((1, *model.shape)), {"mark": squash(u), "place": shared["place"]})
            reached = activation(model, variables, image)[0][shared["neurons"]]
            return ((reached - shared["activation"]) ** 2).sum()

        update, moments = direction("adam").update(jax.grad(loss)(state[0]), state[1])
        return state[0] - rate * update, moments

    return step


def inject(
    config: MarkConfig, variables: Variables, task: Task, key: Key, arrays: Arrays, refresh: Callable | None = None
) -> tuple[Variables, Arrays]:
    """Fine-tune from `variables` with the mark on a share of every batch: (variables, arrays after the last epoch).

    Raises InputError when the share is less than one image.
    """
    if int(config.ratio * len(task.images)) == 0:
        raise InputError(f"attack.ratio={config.ratio} of {len(task.images)} images is none. Use a larger ratio.")
    recipe = {
        "epochs": config.epochs, "optimizer": "sgd", "momentum": 0.9, "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    hook = TrainingHook((config, task.classes), shares=(config.ratio,), transform=_poisoned, refresh=refresh)
    variables, attacker = task.fit_with_hook(
        task.images, task.labels, fit_key(key), hook, {"fixed": arrays}, start=variables, recipe=recipe
    )
    return variables, {name: np.asarray(value) for name, value in attacker["fixed"].items()}


def _poisoned(
    setting: tuple[MarkConfig, int], attacker: Any, images: Images, labels: jax.Array, info: SampleInfo
) -> Batch:
    """The batch with the images of role 1 marked and relabelled."""
    config, classes = setting
    chosen, labels = relabelled(config, labels, classes, info.role)
    marked = paste(images, attacker["fixed"])
    return Batch(jnp.where(chosen[:, None, None, None], marked, images), labels)
