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
        """All τ that are tried, in ascending order."""
        if self.threshold is not None:
            return [self.threshold]
        number = int(self.highest_threshold / self.threshold_step + 1e-9) + 1
        return [round(index * self.threshold_step, 10) for index in range(number)]


class Masking(NamedTuple):
    """Hyper-parameters of :func:`learnt` that can change without recompilation."""

    learning_rate: float
    """Learning rate of SGD on the masks."""
    momentum: float
    """Momentum of SGD."""
    alpha: float
    """Weight of the unperturbed loss; the loss at perturbed scales and biases has weight 1 - alpha."""
    epsilon: float = 0.0
    """Bound of the perturbation, relative to scale and bias."""


def scales(who: str, model: Model, variables: Variables) -> dict[str, jax.Array]:
    """γ of every batch normalisation, [C], by the layer's path.

    Args: who: the method, for the message. Raises InputError for a model without batch normalisation.
    """
    leaves, stats = models.kernels(variables["params"]), models.kernels(variables["batch_stats"])
    layers = [path.removesuffix("/var") for path in stats if path.endswith("/var")]
    found = {layer: leaves[f"{layer}/scale"] for layer in layers if f"{layer}/scale" in leaves}
    if not found:
        raise InputError(
            f"{who} prunes channels by their batch normalisation, and model {model.name!r} has none with a scale. Use "
            "a model that has one (cnn, resnet18, vgg16_bn), or fine_pruning, which needs only the last layer."
        )
    return found


def without(variables: Variables, pruned: Channels, biases: bool = False) -> Variables:
    """The variables with γ = 0 (with `biases` also β = 0) for the channels in `pruned`, bool [C] by layer."""
    leaves, changed = models.kernels(variables["params"]), {}
    for layer, gone in pruned.items():
        for leaf in ("scale", "bias") if biases else ("scale",):
            if (path := f"{layer}/{leaf}") in leaves and np.any(gone):
                own = np.asarray(leaves[path])
                changed[path] = jnp.asarray(np.where(np.asarray(gone), np.zeros_like(own), own))  # compiles nothing
    return {**variables, "params": models.with_kernels(variables["params"], changed)}


def parted(view: DefenderView, key: Key) -> tuple[DefenderView, DefenderView]:
    """The views for training and for validation: the view's own validation images, or a fifth where it has none.

    With fewer than 50 images none are held out, and both are the view itself.
    """
    view = view if view.validation is not None else split_off(view, 0.2, key)
    return view, view.validation or view


def swept(victim: Victim, masks: Channels, config: SweepConfig, judged: DefenderView, callback: Callback) -> Variables:
    """The victim pruned at the Config's threshold, or at the largest one at which validation accuracy holds.

    Args: masks: float [C] by layer; judged: the images that accuracy is measured on.
    Returns: the variables; the victim's own where accuracy holds at no threshold. The watch is shown every candidate
      with its `threshold`, number of `pruned` channels and `validation_accuracy`, and at the end the returned one with
      its `chosen_threshold` (-1: none).
    """
    found = {layer: np.asarray(mask) for layer, mask in masks.items()}
    right = before = accuracy(victim, victim.variables, judged)
    chosen, last, step = -1.0, 0, 0
    kept: Variables = {**victim.variables}
    for step, threshold in enumerate(config.thresholds(), 1):
        gone = {layer: mask <= threshold for layer, mask in found.items()}
        candidate, number = without(victim.variables, gone), sum(int(one.sum()) for one in gone.values())
        if number != last:
            right, last = accuracy(victim, candidate, judged), number
        callback.on_round_end(
            step, candidate, threshold=jnp.float32(threshold), pruned=jnp.int32(number),
            validation_accuracy=jnp.float32(right),
        )  # fmt: skip
        if right >= before - config.largest_drop - 1e-9 or config.threshold is not None:
            chosen, kept = threshold, candidate
    callback.on_round_end(step + 1, kept, chosen_threshold=jnp.float32(chosen))
    return kept


def learnt(
    model: Model, variables: Variables, view: DefenderView, order: jax.Array, values: Masking, noise_steps: int,
    policy: str, key: Key, stage: str,
) -> dict[str, jax.Array]:  # fmt: skip
    """Masks on the scales, trained from 1 by SGD and clipped to [0, 1] after each step, float32 [C] by layer.

    A step minimises alpha CE(m γ, β) + (1 - alpha) CE((m + ξ) γ, (1 + δ) β) in training mode (the batch's statistics),
    ξ and δ drawn from U[-ε, ε] at each step and moved by `noise_steps` signed gradient steps of ε / noise_steps up the
    second term, without projection. With `noise_steps` 0 the second term is left out.

    Args:
      order: int32 [steps, B], indices into the view; policy: augmentation; stage: name of the steps, for the watch.
    Raises InputError for a loss that is not finite.
    """
    steps, size = order.shape
    found = scales(stage, model, variables)
    keys = jax.random.split(jax.random.fold_in(key, 0), (2, steps, size))
    split = {"index": order, "augment": keys[0], "dropout": keys[1]}
    whole = {"noise": jax.random.split(jax.random.fold_in(key, 1), steps)}
    shared = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "variables": jax.tree.map(jnp.asarray, {**variables}),
        "values": {name: jnp.float32(value) for name, value in values._asdict().items()},
    }
    state: dict[str, Any] = {"masks": {layer: jnp.ones_like(scale) for layer, scale in found.items()}}
    state["opt"] = direction("sgd", values.momentum).init(state["masks"])
    tick = partial(view.callback.on_progress, stage)
    state, metrics = run_epoch(mask_step(model, noise_steps, policy), state, split, whole, shared, tick=tick)
    check_finite(metrics["loss"], values.learning_rate, 0, f"{stage} loss", "defense.learning_rate")
    return state["masks"]


@lru_cache(maxsize=16)
def mask_step(model: Model, noise_steps: int, policy: str) -> Callable:
    """One step of the masks, in the engine's form: see :func:`learnt`."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        values, given = shared["values"], shared["variables"]
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels, leaves = shared["labels"][split["index"]], models.kernels(given["params"])

        def loss(masks: Channels, noise: Any = None) -> jax.Array:
            changed = {}
            for layer, mask in masks.items():
                scale, bias = f"{layer}/scale", f"{layer}/bias"
                changed[scale] = (mask if noise is None else mask + noise["scale"][layer]) * leaves[scale]
                if noise is not None and bias in leaves:
                    changed[bias] = (1 + noise["bias"][layer]) * leaves[bias]
            own = {**given, "params": models.with_kernels(given["params"], changed)}
            logits = model.apply(own, images, True, split["dropout"], axis)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        noise = None
        if noise_steps:
            noise = _drawn(whole["noise"], state["masks"], values["epsilon"])
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


def _drawn(key: Key, like: Channels, epsilon: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """ξ ("scale") and δ ("bias") of every layer, uniform in [-ε, ε]."""
    return {
        name: {
            layer: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, kind), place), mask.shape, mask.dtype,
                                      -epsilon, epsilon)
            for place, (layer, mask) in enumerate(sorted(like.items()))
        }
        for kind, name in enumerate(("scale", "bias"))
    }  # fmt: skip
