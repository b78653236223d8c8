"""Rounds of unlearning on targeted universal perturbations: shared by targeted_unlearning and I-BAU's default schedule.

Each round trains θ from the victim θ₀, BatchNorm's statistics frozen, on

    E(δ, θ) = (1 − λ) CE(f_θ(x + δ), y) + λ CE(f_θ(z), softmax f_θ₀(z)),

where a share of the batch x carries perturbations δ and z are mixtures of augmented clean images, on which the victim
is right to be followed, since they carry no trigger; then it searches the perturbations anew in the present model. Some
are small in L2 norm and added to the image (:mod:`bdjax.defenses._smallest`), others are small in area and replace a
part of it (:mod:`bdjax.defenses._patches`), for triggers of either kind. With a solver the step follows the
hypergradient of E, δ being the maximiser of the cross-entropy of the images that carry it; without one, the direct term
alone.
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
from bdjax.defenses._pool import batches
from bdjax.defenses._targeted_search import KEPT, Search, TargetedSearch
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.hypergrad import hypergradient, solver
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float

AVERAGED = 0.8
"""Share of the running mean of θ that a step keeps. The mean is returned: single steps lose accuracy by chance."""


@dataclass(frozen=True)
class Rounds:
    """How θ is trained."""

    name: str
    """Of the defense, for messages and progress."""
    rounds: int
    steps: int
    batch_size: int
    learning_rate: float
    rate_field: str
    """The user's field of the learning rate, for messages."""
    patched_fraction: float
    distillation: float
    enlarged: float = 1.2
    settling: int = 3
    """Rounds at the end in which the triggers stay as they are and the learning rate falls to zero."""
    solver: str = "none"
    solver_iterations: int = 5
    solver_step: float = 0.1
    ridge: float = 0.0
    penalty: float = 1e-3
    """Weight of ‖δ‖² in the inner objective."""


def unlearn(rounds: Rounds, search_: Search, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn what sends all images to a suspicious class.

    Args:
      rounds, search_: the procedure; victim: the model; view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws batches, starts and mixtures.

    Returns: the variables after the last round. After each round the watch is shown them, the perturbations and
      `radius` (the smallest, over the median of all classes before).
    """
    model = victim.model
    targeted = TargetedSearch(search_, victim, view, key, rounds.name)
    state = {"params": jax.tree.map(jnp.copy, victim.variables["params"])}
    state["opt"] = direction("adam").init(state["params"])
    state["mean"] = jax.tree.map(jnp.copy, state["params"])
    most = rounds.rounds + rounds.settling
    shared: dict[str, Any] = {
        "images": jnp.asarray(view.images), "labels": jnp.asarray(view.labels), "victim": dict(victim.variables),
        **{name: jnp.float32(getattr(rounds, name)) for name in _DYNAMIC},
    }  # fmt: skip
    searching, settled, round_ = True, 0, 0
    while searching or settled < rounds.settling:
        settled += not searching
        rate = rounds.learning_rate * (1 - settled / (rounds.settling + 1))
        round_key = jax.random.fold_in(jax.random.fold_in(key, 4), round_)
        split, carried = _batches(rounds, targeted, len(view.labels), round_key)
        kept, deltas = targeted.triggers(rounds.enlarged)
        shared |= {"kept": kept, "deltas": deltas, "learning_rate": jnp.float32(rate)}
        step = _step(model, rounds.solver, rounds.solver_iterations, carried)
        tick = partial(view.callback.on_progress, f"{rounds.name} round {round_ + 1} of at most {most}")
        state, metrics = run_epoch(step, state, split, {}, shared, tick=tick)
        check_finite(metrics["loss"], rate, round_ * rounds.steps, "unlearning loss", rounds.rate_field)
        round_ += 1
        variables = {**victim.variables, "params": jax.tree.map(jnp.copy, state["mean"])}
        if searching:
            targeted.refresh(variables, jax.random.fold_in(round_key, 9))
            searching = round_ < rounds.rounds and not targeted.nothing_small
        shown = {"perturbation": targeted.present.deltas, "radius": jnp.float32(targeted.radius)}
        view.callback.on_round_end(round_, variables, **shown)
    return variables


def _batches(rounds: Rounds, targeted: TargetedSearch, total: int, key: Key) -> tuple[dict[str, jax.Array], int]:
    """Of one round, each [steps, batch]: images, which perturbation each carries (0: none), and what is mixed; and how
    many images of a batch carry one. Of the others a share is of the suspicious classes."""
    size, starts = batch_of(rounds.batch_size, total), targeted.number
    shape = (rounds.steps, size)
    carried = max(1, round(rounds.patched_fraction * size))
    place = np.arange(size)
    of_targets = targeted.of_targets(jax.random.fold_in(key, 4), shape)
    kept = 0 if of_targets is None else min(round(KEPT * size), size - carried)
    role = np.where(place < carried, 1 + place % starts, np.where(place >= size - kept, -1, 0)).astype(np.int32)
    roles = jax.random.permutation(jax.random.fold_in(key, 1), jnp.broadcast_to(role, shape), 1, independent=True)
    index = jnp.asarray(batches(jax.random.fold_in(key, 0), total, size, rounds.steps))
    split = {
        "index": index if of_targets is None else jnp.where(roles < 0, of_targets, index),
        "which": jnp.maximum(roles, 0),
        "other": jax.random.randint(jax.random.fold_in(key, 2), shape, 0, total),
        "key": jax.random.split(jax.random.fold_in(key, 3), shape),
    }
    return split, carried


_DYNAMIC = ("distillation", "solver_step", "ridge", "penalty")  # other values compile nothing new


@lru_cache(maxsize=16)
def _step(model: Model, solver_name: str, iterations: int, carried: int) -> Callable:
    """One step of θ, in the engine's form; `carried` images of a batch carry a perturbation."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        carries = split["which"] > 0
        mixed = mixtures(images, to_float(shared["images"][split["other"]]), split["key"])
        wanted = targets(model, shared["victim"], mixed)
        devices = parallel.size(axis)

        def stamped(deltas: jax.Array) -> jax.Array:
            which = jnp.maximum(split["which"] - 1, 0)
            changed = jnp.clip(images * shared["kept"][which] + deltas[which], 0, 1)
            return jnp.where(carries[:, None, None, None], changed, images)

        def outer(deltas: jax.Array, params: Any) -> jax.Array:
            """This device's share of E."""
            variables = {**shared["victim"], "params": params}
            logits = model.logits(variables, jnp.concatenate([stamped(deltas), mixed]))
            hard = optax.softmax_cross_entropy_with_integer_labels(logits[: len(images)], labels).mean()
            soft = distance(logits[len(images) :], wanted)
            return ((1 - shared["distillation"]) * hard + shared["distillation"] * soft) / devices

        def inner(deltas: jax.Array, params: Any) -> jax.Array:
            """This device's share of −CE of the images that carry a perturbation, + penalty ‖δ‖²."""
            # on one device their number is known, and the others need not be computed
            own = jnp.argsort(~carries)[:carried] if axis is None else jnp.arange(len(images))
            logits = model.logits({**shared["victim"], "params": params}, stamped(deltas)[own])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[own])
            entropy = jnp.where(carries[own], losses, 0).sum() / carried
            return shared["penalty"] * (deltas**2).sum() / devices - entropy

        value, gradient, _ = hypergradient(
            inner, outer, shared["deltas"], state["params"],
            solver(solver_name, iterations, shared["solver_step"], shared["ridge"]),
            partial(parallel.total, axis=axis),
        )  # fmt: skip
        update, opt = direction("adam").update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - shared["learning_rate"] * u, state["params"], update)
        mean = jax.tree.map(lambda m, p: AVERAGED * m + (1 - AVERAGED) * p, state["mean"], params)
        return {"params": params, "opt": opt, "mean": mean}, {"loss": value}

    return step
