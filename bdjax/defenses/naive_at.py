"""Naive adversarial training with universal perturbations, what I-BAU improves on (Zeng et al., ICLR 2022, Figure 1).

Threat model: the defender has the model and clean labelled images, no trigger.

Each round finds one perturbation δ for all images and then steps θ as if δ did not depend on θ (Danskin's theorem,
which holds for an exact inner maximum only):

    δ ≈ argmax_{‖δ‖ <= C} mean CE(f(x + δ), y),        θ <- θ - β ∂/∂θ mean CE(f(x + δ), y)

I-BAU differs by the derivative of δ in θ. The paper's Figure 1 finds δ by DeepFool steps image after image
(Moosavi-Dezfooli et al., CVPR 2017); deviation: projected gradient ascent of the mean loss here, which the loss above
asks for and which runs on batches. The paper gives no constants: C, the batches and Adam's rate are those of I-BAU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.defenses._universal import loss_of, universal
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The alternation."""

    rounds: int = 5
    """Times that δ is found anew."""
    batch_size: int = 100
    """Images a step, at most; a last, smaller batch waits for the next round's shuffle."""
    passes: int = 1
    """Passes over the images in which δ ascends, one step a batch."""
    norm_bound: float = 10.0
    """C, L2 bound of δ in pixel units of [0, 1]."""
    step: float = 1.0
    """Length of a step of δ, in the same units."""
    learning_rate: float = 1e-3
    """β, of Adam."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("rounds", "batch_size", "passes"), "at least 1", lambda v: v >= 1),
            (("norm_bound", "step", "learning_rate"), "positive", lambda v: v > 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Alternate between one perturbation for all images and an epoch of training against it.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: shuffles them.
    Returns: the variables; the watch is shown them and δ (float32 [1, H, W, C]) after each round.
    """
    descend = _step(victim.model)
    size = max(1, min(config.batch_size, len(view.labels)) // parallel.count()) * parallel.count()
    number = len(view.labels) // size
    shared = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "batch_stats": victim.variables["batch_stats"],
        "hyper": {name: jnp.float32(getattr(config, name)) for name in ("norm_bound", "step", "learning_rate")},
    }
    state = {"params": jax.tree.map(jnp.copy, victim.variables["params"])}
    state["opt"] = direction("adam").init(state["params"])
    for round_ in range(config.rounds):
        tick = partial(view.callback.on_progress, f"adversarial training, round {round_ + 1} of {config.rounds}")
        keys = jax.random.split(jax.random.fold_in(key, round_), config.passes + 1)
        orders = [jax.random.permutation(k, len(view.labels))[: number * size].reshape(number, size) for k in keys]
        inner = {**shared, "params": state["params"]}
        delta = universal(victim.model, inner, jnp.concatenate(orders[1:]), tick)
        state, metrics = run_epoch(descend, state, {"index": orders[0]}, {}, {**shared, "delta": delta}, tick=tick)
        check_finite(metrics["loss"], config.learning_rate, round_ * number, "loss", "defense.learning_rate")
        variables = {"params": state["params"], "batch_stats": shared["batch_stats"]}
        view.callback.on_round_end(round_ + 1, variables, perturbation=delta)
    return variables


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    def descend(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(loss_of, 2)(model, shared["delta"], state["params"], shared, split)
        value, gradient = parallel.average((value, gradient), axis)
        update, opt = direction("adam").update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - shared["hyper"]["learning_rate"] * u, state["params"], update)
        return {"params": params, "opt": opt}, {"loss": value}

    return descend
