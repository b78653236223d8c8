"""Naive adversarial training with universal perturbations, the baseline that I-BAU improves on.

Figure 1 of Y. Zeng, S. Chen, W. Park, Z. M. Mao, M. Jin and R. Jia, "Adversarial Unlearning of Backdoors via Implicit
Hypergradient" (I-BAU), ICLR 2022, arXiv:2110.03735.

Threat model: the defender has the model and clean labelled images, but no trigger.

Each round computes one perturbation δ for all images, then steps θ as if δ did not depend on θ (Danskin's theorem,
which requires an exact inner maximum):

    δ ≈ argmax_{‖δ‖ <= C} mean CE(f(x + δ), y),        θ <- θ - β ∂/∂θ mean CE(f(x + δ), y)

I-BAU adds the derivative of δ with respect to θ.

Deviations:

- The paper computes δ by DeepFool steps, image after image (S.-M. Moosavi-Dezfooli, A. Fawzi, O. Fawzi and P. Frossard,
  "Universal Adversarial Perturbations", CVPR 2017). Here δ follows projected gradient ascent of the mean loss, which
  maximises the same loss and works on batches.
- The paper gives no constants: C, the batch size and Adam's learning rate are those of I-BAU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.defenses._batch import shuffled_batches
from bdjax.defenses._universal import perturbed_loss, universal
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, take_step
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the alternation."""

    rounds: int = 5
    """Rounds, each of which computes δ anew."""
    batch_size: int = 100
    """Images per step, at most; the images of a last, smaller batch are left out until the next shuffle."""
    passes: int = 1
    """Passes over the images in the ascent of δ, one step per batch."""
    norm_bound: float = 10.0
    """C, L2 bound of δ in pixel units of [0, 1]."""
    step: float = 1.0
    """Length of one ascent step of δ, in the same units."""
    learning_rate: float = 1e-3
    """β, learning rate of Adam."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("rounds", "batch_size", "passes"), "at least 1", lambda v: v >= 1),
            (("norm_bound", "step", "learning_rate"), "positive", lambda v: v > 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Alternate between one perturbation for all images and an epoch of training against it.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each round its callback receives the variables and
        δ (`perturbation`, float32 [1, H, W, C]).
      key: shuffles the images.

    Returns:
      The cleaned variables.

    Raises:
      InputError: when the loss is not finite.
    """
    step = _step(victim.model)
    batch_size = max(1, min(config.batch_size, len(view.labels)) // parallel.count()) * parallel.count()
    steps = len(view.labels) // batch_size
    constants = {
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
        passes = [shuffled_batches(k, len(view.labels), steps, batch_size) for k in keys]
        inner_constants = {**constants, "params": state["params"]}
        delta = universal(victim.model, inner_constants, jnp.concatenate(passes[1:]), tick)
        state, metrics = run_epoch(step, state, {"index": passes[0]}, {}, {**constants, "delta": delta}, tick=tick)
        check_finite(metrics["loss"], config.learning_rate, round_ * steps, "loss", "defense.learning_rate")
        variables = {"params": state["params"], "batch_stats": constants["batch_stats"]}
        view.callback.on_round_end(round_ + 1, variables, perturbation=delta)
    return variables


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """Return one step of θ, in the engine's form."""

    def descend(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        loss, gradient = jax.value_and_grad(perturbed_loss, 2)(
            model, constants["delta"], state["params"], constants, batch
        )
        loss, gradient = parallel.average((loss, gradient), axis)
        update, opt = direction("adam").update(gradient, state["opt"])
        params = take_step(state["params"], update, constants["hyper"]["learning_rate"])
        return {"params": params, "opt": opt}, {"loss": loss}

    return descend
