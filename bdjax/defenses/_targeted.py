"""Rounds of unlearning on small targeted triggers: shared by targeted_unlearning and I-BAU's default schedule.

Each round trains θ, starting from the victim θ₀ and with frozen BatchNorm statistics, on

    E(δ, θ) = (1 − λ) CE(f_θ(x + δ), y) + λ CE(f_θ(z), softmax f_θ₀(z)).

Some images of the batch x carry triggers δ. z are mixtures of augmented clean images; they carry no trigger, so the
victim is a valid teacher on them. Then the round searches the triggers again in the current model. Some triggers have a
small L2 norm and are added to the image (:mod:`bdjax.defenses._smallest`), others have a small area and replace a part
of it (:mod:`bdjax.defenses._patches`), so that both kinds of backdoor triggers are covered. With a solver, a step of θ
follows the hypergradient of E, where δ is the maximiser of the cross-entropy of the images that carry it. Without a
solver, it follows the direct term alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import batch_of
from bdjax.defenses._distillation import distance, mixtures, targets
from bdjax.defenses._pool import draw_batches
from bdjax.defenses._targeted_search import TARGET_CLASS_SHARE, Search, TargetedSearch
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, take_step
from bdjax.hypergrad import hypergradient, solver
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float

AVERAGED = 0.8
"""Weight of the old value in the running mean of θ. The mean is returned, because single steps fluctuate in
accuracy."""


@dataclass(frozen=True)
class Rounds:
    """Hyper-parameters of the training of θ."""

    name: str
    """Name of the defense, for messages and progress."""
    rounds: int
    """Largest number of rounds in which the triggers are searched again."""
    steps: int
    """Steps of θ per round."""
    batch_size: int
    """Images per step."""
    learning_rate: float
    """Learning rate of Adam on θ."""
    rate_field: str
    """The user's Config field of the learning rate, for messages."""
    patched_fraction: float
    """Fraction of a batch that carries a trigger."""
    distillation: float
    """λ."""
    enlarged: float = 1.2
    """Factor by which the triggers are enlarged before they are unlearned."""
    settling: int = 3
    """Rounds at the end in which the triggers stay fixed and the learning rate falls to zero."""
    solver: str = "none"
    """Solver of the hypergradient; "none": the direct term alone."""
    solver_iterations: int = 5
    """Iterations of the solver."""
    solver_step: float = 0.1
    """Step size of the solver."""
    ridge: float = 0.0
    """Multiple of the identity that is added to the inner Hessian."""
    penalty: float = 1e-3
    """Weight of ‖δ‖² in the inner objective."""


def unlearn(rounds: Rounds, search: Search, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn the small triggers that send images to suspicious classes.

    Args:
      rounds: hyper-parameters of the training.
      search: hyper-parameters of the search for triggers.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each round its callback receives the variables, the
        perturbations, and `radius` (the smallest radius relative to the initial median of all classes).
      key: draws batches, initial perturbations and mixtures.

    Returns:
      The variables after the last round.
    """
    model = victim.model
    targeted = TargetedSearch(search, victim, view, key, rounds.name)
    state = {"params": jax.tree.map(jnp.copy, victim.variables["params"])}
    state["opt"] = direction("adam").init(state["params"])
    state["mean"] = jax.tree.map(jnp.copy, state["params"])
    most_rounds = rounds.rounds + rounds.settling
    constants: dict[str, Any] = {
        "images": jnp.asarray(view.images), "labels": jnp.asarray(view.labels), "victim": dict(victim.variables),
        **{name: jnp.float32(getattr(rounds, name)) for name in _DYNAMIC},
    }  # fmt: skip
    searching, settling_rounds, round_ = True, 0, 0
    while searching or settling_rounds < rounds.settling:
        settling_rounds += not searching
        rate = rounds.learning_rate * (1 - settling_rounds / (rounds.settling + 1))
        round_key = jax.random.fold_in(jax.random.fold_in(key, 4), round_)
        batches, patched_count = _batches(rounds, targeted, len(view.labels), round_key)
        kept_fractions, deltas = targeted.triggers(rounds.enlarged)
        constants |= {"kept": kept_fractions, "deltas": deltas, "learning_rate": jnp.float32(rate)}
        step = _step(model, rounds.solver, rounds.solver_iterations, patched_count)
        tick = partial(view.callback.on_progress, f"{rounds.name} round {round_ + 1} of at most {most_rounds}")
        state, metrics = run_epoch(step, state, batches, {}, constants, tick=tick)
        check_finite(metrics["loss"], rate, round_ * rounds.steps, "unlearning loss", rounds.rate_field)
        round_ += 1
        variables = {**victim.variables, "params": jax.tree.map(jnp.copy, state["mean"])}
        if searching:
            targeted.refresh(variables, jax.random.fold_in(round_key, 9))
            searching = round_ < rounds.rounds and not targeted.is_exhausted
        report = {"perturbation": targeted.perturbations.deltas, "radius": jnp.float32(targeted.relative_radius)}
        view.callback.on_round_end(round_, variables, **report)
    return variables


def _batches(rounds: Rounds, targeted: TargetedSearch, total: int, key: Key) -> tuple[dict[str, jax.Array], int]:
    """Draw the batches of one round, and return the number of images per batch that carry a trigger.

    A share `TARGET_CLASS_SHARE` of each batch are clean images of the suspicious classes.

    Returns:
      The arrays, each [steps, batch]: "index" (positions of the images), "which" (the trigger of each image, from 1; 0:
      none), "other" (positions of the images to mix in) and "key"; and the number of images that carry a trigger.
    """
    batch_size, trigger_count = batch_of(rounds.batch_size, total), targeted.trigger_count
    shape = (rounds.steps, batch_size)
    patched_count = max(1, round(rounds.patched_fraction * batch_size))
    position = np.arange(batch_size)
    target_images = targeted.draw_target_images(jax.random.fold_in(key, 4), shape)
    target_count = (
        0 if target_images is None else min(round(TARGET_CLASS_SHARE * batch_size), batch_size - patched_count)
    )
    is_patched, is_target = position < patched_count, position >= batch_size - target_count
    role = np.where(is_patched, 1 + position % trigger_count, np.where(is_target, -1, 0)).astype(np.int32)
    roles = jax.random.permutation(jax.random.fold_in(key, 1), jnp.broadcast_to(role, shape), 1, independent=True)
    shuffled = jnp.asarray(draw_batches(jax.random.fold_in(key, 0), total, batch_size, rounds.steps))
    batches = {
        "index": shuffled if target_images is None else jnp.where(roles < 0, target_images, shuffled),
        "which": jnp.maximum(roles, 0),
        "other": jax.random.randint(jax.random.fold_in(key, 2), shape, 0, total),
        "key": jax.random.split(jax.random.fold_in(key, 3), shape),
    }
    return batches, patched_count


_DYNAMIC = ("distillation", "solver_step", "ridge", "penalty")  # other values compile nothing new


@lru_cache(maxsize=16)
def _step(model: Model, solver_name: str, iterations: int, patched_count: int) -> Callable:
    """Return one step of θ, in the engine's form; `patched_count` images of a batch carry a trigger."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]
        carries = batch["which"] > 0
        mixed_images = mixtures(images, to_float(constants["images"][batch["other"]]), batch["key"])
        soft_labels = targets(model, constants["victim"], mixed_images)
        devices = parallel.size(axis)

        def stamp(deltas: jax.Array) -> jax.Array:
            trigger_indices = jnp.maximum(batch["which"] - 1, 0)
            triggered = jnp.clip(images * constants["kept"][trigger_indices] + deltas[trigger_indices], 0, 1)
            return jnp.where(carries[:, None, None, None], triggered, images)

        def outer(deltas: jax.Array, params: Any) -> jax.Array:
            """Return this device's share of E."""
            variables = {**constants["victim"], "params": params}
            logits = model.logits(variables, jnp.concatenate([stamp(deltas), mixed_images]))
            label_loss = optax.softmax_cross_entropy_with_integer_labels(logits[: len(images)], labels).mean()
            distillation_loss = distance(logits[len(images) :], soft_labels)
            return (
                (1 - constants["distillation"]) * label_loss + constants["distillation"] * distillation_loss
            ) / devices

        def inner(deltas: jax.Array, params: Any) -> jax.Array:
            """Return this device's share of −CE of the images that carry a trigger, plus penalty ‖δ‖²."""
            # on one device their number is known, and the others need not be computed
            patched_positions = jnp.argsort(~carries)[:patched_count] if axis is None else jnp.arange(len(images))
            logits = model.logits({**constants["victim"], "params": params}, stamp(deltas)[patched_positions])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[patched_positions])
            entropy = jnp.where(carries[patched_positions], losses, 0).sum() / patched_count
            return constants["penalty"] * (deltas**2).sum() / devices - entropy

        value, gradient, _ = hypergradient(
            inner, outer, constants["deltas"], state["params"],
            solver(solver_name, iterations, constants["solver_step"], constants["ridge"]),
            partial(parallel.total, axis=axis),
        )  # fmt: skip
        update, opt = direction("adam").update(gradient, state["opt"])
        params = take_step(state["params"], update, constants["learning_rate"])
        mean = jax.tree.map(lambda m, p: AVERAGED * m + (1 - AVERAGED) * p, state["mean"], params)
        return {"params": params, "opt": opt, "mean": mean}, {"loss": value}

    return step
