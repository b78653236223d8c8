"""Pruning by the scales of batch normalisation: which channels go, masks that are trained on them, how many may go.

A channel c of a layer gives γ_c n_c + β_c, n_c being what normalisation makes of it; it is pruned by γ_c = 0, after
which it gives β_c whatever the image is. A mask m in [0, 1] multiplies γ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import augment, models
from bdjax.defenses._guard import accuracy, split_off
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, Watch, to_float

Channels = Mapping[str, Any]
"""By the path of a layer of batch normalisation, an array [C]."""


@dataclass(frozen=True)
class SweepConfig:
    """Which channels go, once masks are trained."""

    threshold: float | None = None
    """τ: channels go whose mask is at most this; None: the largest of 0, `threshold_step`, ... up to
    `highest_threshold` at which accuracy on images that nothing is learnt from holds."""
    highest_threshold: float = 0.95
    """The last τ that is tried, in [0, 1]."""
    threshold_step: float = 0.05
    """From one τ to the next; positive."""
    largest_drop: float = 0.03
    """Accuracy holds if it falls by at most this, a fraction in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("highest_threshold", "largest_drop"), "in [0, 1]", lambda v: 0 <= v <= 1),
            (("threshold_step",), "positive", lambda v: v > 0),
            (("threshold",), "in [0, 1], or None", lambda v: v is None or 0 <= v <= 1),
        )

    def thresholds(self) -> list[float]:
        """Every τ that is tried, ascending."""
        if self.threshold is not None:
            return [self.threshold]
        number = int(self.highest_threshold / self.threshold_step + 1e-9) + 1
        return [round(index * self.threshold_step, 10) for index in range(number)]


class Masking(NamedTuple):
    """Of :func:`learnt`: values that may change without compiling anything."""

    learning_rate: float
    """Of the masks' SGD."""
    momentum: float
    """Of it."""
    alpha: float
    """Weight of the loss at the masks; the loss at perturbed scales and biases has 1 - alpha."""
    epsilon: float = 0.0
    """Bound of the perturbation, relative to scale and bias."""


def scales(who: str, model: Model, variables: Variables) -> dict[str, jax.Array]:
    """γ of every batch normalisation, [C], by the layer's path.

    Args: who: names the method that needs one. Raises InputError for a model without any.
    """
    leaves, stats = models.kernels(variables["params"]), models.kernels(variables["batch_stats"])
    layers = [path.removesuffix("/var") for path in stats if path.endswith("/var")]
    found = {layer: leaves[f"{layer}/scale"] for layer in layers if f"{layer}/scale" in leaves}
    if not found:
        raise InputError(
            f"{who} prunes channels by their batch normalisation, and model {model.name!r} has none with a scale. "
            "Use a model that has (cnn, resnet18, vgg16_bn), or fine_pruning, which needs only the last layer."
        )
    return found


def without(variables: Variables, pruned: Channels, biases: bool = False) -> Variables:
    """The variables with γ = 0 (and β = 0, with `biases`) where `pruned` (bool [C] by layer) says so."""
    leaves, changed = models.kernels(variables["params"]), {}
    for layer, gone in pruned.items():
        for leaf in ("scale", "bias") if biases else ("scale",):
            if (path := f"{layer}/{leaf}") in leaves and np.any(gone):
                own = np.asarray(leaves[path])
                changed[path] = jnp.asarray(np.where(np.asarray(gone), np.zeros_like(own), own))  # compiles nothing
    return {**variables, "params": models.with_kernels(variables["params"], changed)}


def parted(view: DefenderView, key: Key) -> tuple[DefenderView, DefenderView]:
    """The view to learn from and the one to judge by: its validation images, or a fifth where it has none.

    Of fewer than 50 images none are kept apart, and both are the view itself.
    """
    view = view if view.validation is not None else split_off(view, 0.2, key)
    return view, view.validation or view


def swept(victim: Victim, masks: Channels, config: SweepConfig, judged: DefenderView, watch: Watch) -> Variables:
    """The victim pruned at the threshold that the Config gives, or at the largest at which its accuracy holds.

    Args: masks: float [C] by layer; judged: what accuracy is measured on.
    Returns: the variables; the victim's own where accuracy holds at no threshold. The watch is shown every candidate,
      with its `threshold`, `pruned` channels and `validation_accuracy`, and at the end the one that is returned, as
      `chosen_threshold` (-1: none).
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
        watch.observe(
            step, candidate, threshold=jnp.float32(threshold), pruned=jnp.int32(number),
            validation_accuracy=jnp.float32(right),
        )  # fmt: skip
        if right >= before - config.largest_drop - 1e-9 or config.threshold is not None:
            chosen, kept = threshold, candidate
    watch.observe(step + 1, kept, chosen_threshold=jnp.float32(chosen))
    return kept


def learnt(
    model: Model, variables: Variables, view: DefenderView, order: jax.Array, values: Masking, noise_steps: int,
    policy: str, key: Key, stage: str,
) -> dict[str, jax.Array]:  # fmt: skip
    """Masks on the scales, trained from 1 by SGD and clipped to [0, 1] after each step, float32 [C] by layer.

    A step minimises alpha CE(m γ, β) + (1 - alpha) CE((m + ξ) γ, (1 + δ) β) in training mode (the batch's statistics),
    ξ and δ drawn from U[-ε, ε] at each step and moved by `noise_steps` signed steps of ε / noise_steps along the
    gradient of the second term, not projected. Without noise steps the second term is left out.

    Args:
      order: int32 [steps, B], positions in the view; policy: augmentation; stage: what the steps are called.
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
    tick = partial(view.watch.tick, stage)
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
