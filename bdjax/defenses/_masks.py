"""Pruning by the scales of batch normalisation: masks that are trained on them, and the choice of a threshold.

A normalised channel c is γ_c n_c + β_c, with n_c its normalised input. Pruning sets γ_c = 0, after which the channel is
β_c for every image. A mask m in [0, 1] multiplies γ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.defenses._guard import accuracy, split_off
from bdjax.defenses._tuning import image_arrays
from bdjax.engine import augment, parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import Callback, DefenderView, Key, Model, Variables, Victim, to_float

Channels = Mapping[str, Any]
"""An array [C] for each batch normalisation, by the path of the layer."""


@dataclass(frozen=True)
class SweepConfig:
    """Which channels are pruned once the masks are trained."""

    threshold: float | None = None
    """τ: channels whose mask is at most this are pruned; None: the largest of 0, `threshold_step`, ... up to
    `highest_threshold` at which accuracy on validation images holds."""
    highest_threshold: float = 0.95
    """The largest τ that is tried, in [0, 1]."""
    threshold_step: float = 0.05
    """Distance from one τ to the next; positive."""
    largest_drop: float = 0.03
    """Accuracy holds if it falls by at most this, absolute, in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("highest_threshold", "largest_drop"), "in [0, 1]", lambda v: 0 <= v <= 1),
            (("threshold_step",), "positive", lambda v: v > 0),
            (("threshold",), "in [0, 1], or None", lambda v: v is None or 0 <= v <= 1),
        )

    def thresholds(self) -> list[float]:
        """Return all τ that are tried, in ascending order."""
        if self.threshold is not None:
            return [self.threshold]
        number = int(self.highest_threshold / self.threshold_step + 1e-9) + 1
        return [round(index * self.threshold_step, 10) for index in range(number)]


class MaskOptimizer(NamedTuple):
    """Hyper-parameters of :func:`learn_masks` that can change without recompilation."""

    learning_rate: float
    """Learning rate of SGD on the masks."""
    momentum: float
    """Momentum of SGD."""
    alpha: float
    """Weight of the unperturbed loss; the loss at perturbed scales and biases has weight 1 - alpha."""
    epsilon: float = 0.0
    """Bound of the perturbation, relative to scale and bias."""


def norm_scales(method: str, model: Model, variables: Variables) -> dict[str, jax.Array]:
    """Return the scale γ of every batch normalisation, [C], by the path of the layer.

    Args:
      method: name of the method, for the message.
      model: the classifier.
      variables: variables of the model.

    Returns:
      The scales.

    Raises:
      InputError: when the model has no batch normalisation with a scale.
    """
    leaves, stats = models.kernels(variables["params"]), models.kernels(variables["batch_stats"])
    layers = [path.removesuffix("/var") for path in stats if path.endswith("/var")]
    scales = {layer: leaves[f"{layer}/scale"] for layer in layers if f"{layer}/scale" in leaves}
    if not scales:
        raise InputError(
            f"{method} prunes channels by their batch normalisation, and model {model.name!r} has none with a scale. "
            "Use a model that has one (cnn, resnet18, vgg16_bn), or fine_pruning, which needs only the last layer."
        )
    return scales


def prune_channels(variables: Variables, pruned: Channels, biases: bool = False) -> Variables:
    """Return the variables with γ = 0 for the pruned channels.

    Args:
      variables: variables of a model.
      pruned: which channels are pruned, bool [C] by layer.
      biases: whether β = 0 is set as well.

    Returns:
      The pruned variables.
    """
    leaves, changed = models.kernels(variables["params"]), {}
    for layer, mask in pruned.items():
        for leaf in ("scale", "bias") if biases else ("scale",):
            if (path := f"{layer}/{leaf}") in leaves and np.any(mask):
                values = np.asarray(leaves[path])
                changed[path] = jnp.asarray(np.where(np.asarray(mask), np.zeros_like(values), values))  # not compiled
    return {**variables, "params": models.with_kernels(variables["params"], changed)}


def split_validation(view: DefenderView, key: Key) -> tuple[DefenderView, DefenderView]:
    """Return a view to train on and a view to validate on: the view's own validation images, or a fifth of its images.

    With fewer than 50 images none are held out, and both are the view itself.
    """
    view = view if view.validation is not None else split_off(view, 0.2, key)
    return view, view.validation or view


def sweep_thresholds(
    victim: Victim, masks: Channels, config: SweepConfig, validation: DefenderView, callback: Callback
) -> Variables:
    """Prune the victim at the Config's threshold, or at the largest one at which validation accuracy holds.

    Args:
      victim: the model to prune.
      masks: the trained masks, float [C] by layer.
      config: the thresholds that are tried, and the allowed loss of accuracy.
      validation: the images on which accuracy is measured.
      callback: receives every candidate with its `threshold`, number of `pruned` channels and `validation_accuracy`,
        and at the end the returned variables with their `chosen_threshold` (-1: none).

    Returns:
      The pruned variables; the victim's where accuracy holds at no threshold.
    """
    values = {layer: np.asarray(mask) for layer, mask in masks.items()}
    current = before = accuracy(victim, victim.variables, validation)
    chosen_threshold, last_number, step = -1.0, 0, 0
    chosen: Variables = {**victim.variables}
    for step, threshold in enumerate(config.thresholds(), 1):
        pruned = {layer: mask <= threshold for layer, mask in values.items()}
        candidate = prune_channels(victim.variables, pruned)
        number = sum(int(mask.sum()) for mask in pruned.values())
        if number != last_number:
            current, last_number = accuracy(victim, candidate, validation), number
        callback.on_round_end(
            step, candidate, threshold=jnp.float32(threshold), pruned=jnp.int32(number),
            validation_accuracy=jnp.float32(current),
        )  # fmt: skip
        if current >= before - config.largest_drop - 1e-9 or config.threshold is not None:
            chosen_threshold, chosen = threshold, candidate
    callback.on_round_end(step + 1, chosen, chosen_threshold=jnp.float32(chosen_threshold))
    return chosen


def learn_masks(
    model: Model, variables: Variables, view: DefenderView, order: jax.Array, optimizer: MaskOptimizer,
    noise_steps: int, policy: str, key: Key, stage: str,
) -> dict[str, jax.Array]:  # fmt: skip
    """Train masks on the scales from 1 by SGD, clipped to [0, 1] after each step.

    A step minimises alpha CE(m γ, β) + (1 - alpha) CE((m + ξ) γ, (1 + δ) β) in training mode (the batch's statistics),
    ξ and δ drawn from U[-ε, ε] at each step and moved by `noise_steps` signed gradient steps of ε / noise_steps up the
    second term, without projection. With `noise_steps` 0 the second term is left out.

    Args:
      model: the classifier.
      variables: its variables, which do not change.
      view: clean images and labels; its callback receives the progress.
      order: int32 [steps, B], indices into the view.
      optimizer: hyper-parameters of the steps.
      noise_steps: number of signed gradient steps of the perturbation.
      policy: name of the augmentation.
      key: random key that augments the images and draws the perturbations.
      stage: name of the training stage, for progress and messages.

    Returns:
      The masks, float32 [C] by layer.

    Raises:
      InputError: when the model has no batch normalisation, or when the loss becomes NaN or infinite.
    """
    steps, size = order.shape
    scales = norm_scales(stage, model, variables)
    keys = jax.random.split(jax.random.fold_in(key, 0), (2, steps, size))
    batch = {"index": order, "augment": keys[0], "dropout": keys[1]}
    per_step = {"noise": jax.random.split(jax.random.fold_in(key, 1), steps)}
    constants = {
        **image_arrays(view.images, view.labels),
        "variables": jax.tree.map(jnp.asarray, {**variables}),
        "values": {name: jnp.float32(value) for name, value in optimizer._asdict().items()},
    }
    state: dict[str, Any] = {"masks": {layer: jnp.ones_like(scale) for layer, scale in scales.items()}}
    state["opt"] = direction("sgd", optimizer.momentum).init(state["masks"])
    tick = partial(view.callback.on_progress, stage)
    state, metrics = run_epoch(mask_step(model, noise_steps, policy), state, batch, per_step, constants, tick=tick)
    check_finite(metrics["loss"], optimizer.learning_rate, 0, f"{stage} loss", "defense.learning_rate")
    return state["masks"]


@lru_cache(maxsize=16)
def mask_step(model: Model, noise_steps: int, policy: str) -> Callable:
    """Return one step of :func:`learn_masks` in the engine's form.

    Args:
      model: the classifier.
      noise_steps: number of signed gradient steps of the perturbation; 0: no perturbation.
      policy: name of the augmentation.

    Returns:
      The step, the same object for the same arguments.
    """
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        values, variables = constants["values"], constants["variables"]
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels, leaves = constants["labels"][batch["index"]], models.kernels(variables["params"])

        def loss(masks: Channels, noise: Any = None) -> jax.Array:
            changed = {}
            for layer, mask in masks.items():
                scale, bias = f"{layer}/scale", f"{layer}/bias"
                changed[scale] = (mask if noise is None else mask + noise["scale"][layer]) * leaves[scale]
                if noise is not None and bias in leaves:
                    changed[bias] = (1 + noise["bias"][layer]) * leaves[bias]
            masked = {**variables, "params": models.with_kernels(variables["params"], changed)}
            logits = model.apply(masked, images, True, batch["dropout"], axis)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        noise = None
        if noise_steps:
            noise = draw_noise(per_step["noise"], state["masks"], values["epsilon"])
            for _ in range(noise_steps):
                uphill = parallel.average(jax.grad(loss, 1)(state["masks"], noise), axis)
                noise = jax.tree.map(
                    lambda n, g: n + values["epsilon"] / noise_steps * jnp.sign(g), noise, uphill
                )  # fmt: skip

        def objective(masks: Channels) -> jax.Array:
            value = values["alpha"] * loss(masks)
            return value if noise is None else value + (1 - values["alpha"]) * loss(masks, noise)

        value, gradient = parallel.average(jax.value_and_grad(objective)(state["masks"]), axis)
        update, opt = direction("sgd", values["momentum"]).update(gradient, state["opt"])
        masks = jax.tree.map(
            lambda m, u: jnp.clip(m - values["learning_rate"] * u, 0, 1), state["masks"], update
        )  # fmt: skip
        return {"masks": masks, "opt": opt}, {"loss": value}

    return step


def draw_noise(key: Key, like: Channels, epsilon: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Draw the noise of every layer.

    Args:
      key: random key.
      like: an array [C] by the path of each layer, whose values are not used.
      epsilon: ε.

    Returns:
      ξ ("scale") and δ ("bias"), uniform in [-ε, ε], by the path of the layer.
    """
    return {
        name: {
            layer: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, kind), index), mask.shape, mask.dtype,
                                      -epsilon, epsilon)
            for index, (layer, mask) in enumerate(sorted(like.items()))
        }
        for kind, name in enumerate(("scale", "bias"))
    }  # fmt: skip
