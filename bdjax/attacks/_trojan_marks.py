"""Marks: small patches, optimised on a trained model that is then fine-tuned to associate them with the target.

Shared by TrojanNN and IMC. A mark k has values in [0, 1] and is pasted at the same place of all images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.attacks._activations import activation, compiled_activation
from bdjax.attacks._poisoning import PoisonConfig, fit_key, put, relabel_batch
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import Arrays, Batch, Images, Key, Model, SampleInfo, Task, TrainingHook, Variables, to_float

SAMPLE = 500  # clean images on which it is judged whether a neuron is active


@dataclass(frozen=True)
class MarkConfig(PoisonConfig):
    """The mark, its optimisation, and the fine-tuning of the model."""

    ratio: float = 0.01
    """Share of the images of every epoch, drawn anew each time, that carry the mark, in (0, 1]."""
    exclude_target: bool = False
    """all_to_one: leave images of the target class out of the marked ones, which are fewer then."""
    size: int = 3
    """Side of the square in pixels, at least 1; BAERASER: 3, 5 and 7."""
    position: Literal["random", "top_left", "top_right", "bottom_left", "bottom_right"] = "random"
    """A corner, or a place drawn once for the model, the same for all images."""
    neurons: int = 2
    """Number of neurons that the mark activates, at least 1."""
    active: float = 0.05
    """Share of clean images on which a neuron must be positive to be chosen, in [0, 1]."""
    activation: float = 100.0
    """Desired activation of a chosen neuron; above 0."""
    iterations: int = 1000
    """Adam steps on the mark before the model is fine-tuned, at least 1."""
    mark_rate: float = 0.1
    """Adam's learning rate for the mark, above 0; falls to 0 as a cosine over `iterations`."""
    epochs: int = 50
    """Epochs of fine-tuning, in place of --fit.epochs."""
    learning_rate: float = 0.01
    """Learning rate of the fine-tuning, by SGD with momentum 0.9, in place of --fit.learning-rate."""
    weight_decay: float = 5e-4
    """Weight decay of the fine-tuning, in place of --fit.weight-decay."""

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
    """Paste arrays["mark"] [s, s, C] into images [N, H, W, C], its first pixel at arrays["place"] (row, column)."""
    return put(images, *(jnp.asarray(arrays[name]) for name in ("mark", "place")))


def squash(u: jax.Array) -> jax.Array:
    """Map unconstrained variables to a mark: k = (tanh(u) + 1) / 2."""
    return (jnp.tanh(u) + 1) / 2


def unsquash(mark: jax.Array) -> jax.Array:
    """Invert :func:`squash`: u = atanh(0.999 (2 k - 1)), finite where k is 0 or 1."""
    return jnp.arctanh(0.999 * (2 * mark - 1))


def final_mark(config: MarkConfig, u: jax.Array) -> jax.Array:
    """Return the mark of u, rounded to k/255 if config.quantise."""
    return jnp.round(squash(u) * 255) / 255 if config.quantise else squash(u)


def optimise_mark(config: MarkConfig, variables: Variables, task: Task, key: Key) -> Arrays:
    """Optimise TrojanNN's mark on a trained model.

    Args:
      config: the mark and its optimisation.
      variables: the trained model.
      task: training set and model.
      key: random key.

    Returns:
      {"mark": float32 [s, s, C] in [0, 1], "place": int32 [2], "neurons": int32 [n]}.

    Raises:
      InputError: when the mark does not fit the images, or too few neurons are active.
    """
    height, width, channels = task.model.shape
    last = height - config.size, width - config.size
    if min(last) < 0:
        raise InputError(f"attack.size={config.size} does not fit images of {height}x{width} pixels. Use a smaller.")
    variables = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), variables)  # from all devices to one
    place_key, mark_key, sample_key = jax.random.split(key, 3)
    if config.position == "random":
        place = jax.random.randint(place_key, (2,), 0, jnp.array(last) + 1)
    else:
        place = jnp.array([last[0] * ("bottom" in config.position), last[1] * ("right" in config.position)])
    sample = jax.random.choice(sample_key, len(task.images), (min(SAMPLE, len(task.images)),), replace=False)
    features = compiled_activation(task.model)(variables, to_float(task.images[np.asarray(sample)]))
    neurons = jnp.asarray(choose_neurons(config, features, variables))
    u = unsquash(jax.random.uniform(mark_key, (config.size, config.size, channels)))
    state, step = (u, direction("adam").init(u)), _step(task.model)
    constants = {"place": place, "neurons": neurons, "activation": jnp.float32(config.activation)}
    for i in range(config.iterations):
        rate = config.mark_rate * (1 + np.cos(np.pi * i / config.iterations)) / 2
        state = step(state, variables, constants, jnp.float32(rate))
        task.callback.on_progress("mark", i + 1, config.iterations)
    mark = final_mark(config, state[0])
    return {"mark": np.asarray(mark), "place": np.asarray(place), "neurons": np.asarray(neurons)}


def choose_neurons(config: MarkConfig, features: Any, variables: Variables) -> np.ndarray:
    """Choose the neurons with the largest sum of absolute outgoing weights, among those that are active often enough.

    Args:
      config: how many neurons, and how often they must be active.
      features: float32 [N, D], the inputs of the last layer on clean images.
      variables: the model.

    Returns:
      int32 [n], indices of neurons.

    Raises:
      InputError: when too few neurons are active.
    """
    weights = models.head(variables["params"])
    active = np.flatnonzero((np.asarray(features) > 0).mean(0) >= config.active)
    if len(active) < config.neurons:
        raise InputError(
            f"attack.neurons={config.neurons}, but only {len(active)} of {features.shape[1]} are active on a share "
            f"attack.active={config.active} of the clean images. Use fewer neurons or a smaller share."
        )
    strength = np.abs(np.asarray(weights)).sum(1)[active]
    return active[np.argsort(-strength, kind="stable")[: config.neurons]].astype(np.int32)


@lru_cache(maxsize=8)
def _step(model: Model) -> Callable:
    """Compile an Adam step on u, towards the desired activation of the chosen neurons on a marked black image."""

    @jax.jit
    def step(state: Any, variables: Variables, constants: Any, rate: jax.Array) -> Any:
        def loss(u: jax.Array) -> jax.Array:
            image = paste(jnp.zeros((1, *model.shape)), {"mark": squash(u), "place": constants["place"]})
            activations = activation(model, variables, image)[0][constants["neurons"]]
            return ((activations - constants["activation"]) ** 2).sum()

        update, moments = direction("adam").update(jax.grad(loss)(state[0]), state[1])
        return state[0] - rate * update, moments

    return step


def inject(
    config: MarkConfig, variables: Variables, task: Task, key: Key, arrays: Arrays, refresh: Callable | None = None
) -> tuple[Variables, Arrays]:
    """Fine-tune a model with the mark on a share of every batch.

    Args:
      config: the share and the recipe of the fine-tuning.
      variables: the initial model.
      task: training set, model and recipe.
      key: key of :func:`bdjax.attacks.plant`.
      arrays: the arrays of :func:`optimise_mark`.
      refresh: the hook's `refresh`, which may change the arrays before each epoch; None: they stay as they are.

    Returns:
      (fine-tuned variables, arrays after the last epoch).

    Raises:
      InputError: when the share is less than one image.
    """
    if int(config.ratio * len(task.images)) == 0:
        raise InputError(f"attack.ratio={config.ratio} of {len(task.images)} images is none. Use a larger ratio.")
    recipe = {
        "epochs": config.epochs, "optimizer": "sgd", "momentum": 0.9, "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    hook = TrainingHook((config, task.classes), shares=(config.ratio,), transform=_mark_batch, refresh=refresh)
    variables, attacker = task.fit_with_hook(
        task.images, task.labels, fit_key(key), hook, {"fixed": arrays}, start=variables, recipe=recipe
    )
    return variables, {name: np.asarray(value) for name, value in attacker["fixed"].items()}


def _mark_batch(
    static: tuple[MarkConfig, int], attacker: Any, images: Images, labels: jax.Array, info: SampleInfo
) -> Batch:
    """Mark and relabel the images of role 1."""
    config, classes = static
    poisoned, labels = relabel_batch(config, labels, classes, info.role)
    marked = paste(images, attacker["fixed"])
    return Batch(jnp.where(poisoned[:, None, None, None], marked, images), labels)
