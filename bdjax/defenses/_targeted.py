"""Rounds of unlearning on targeted universal perturbations: shared by targeted_unlearning and I-BAU's default schedule.

Each round trains θ from the victim θ₀, BatchNorm's statistics frozen, on

    E(δ, θ) = (1 − λ) CE(f_θ(x + δ), y) + λ CE(f_θ(z), softmax f_θ₀(z)),

where a share of the batch x carries perturbations δ and z are mixtures of augmented clean images, on which the victim
is right to be followed, since they carry no trigger; then it searches the perturbations anew in the present model
(:mod:`bdjax.defenses._smallest`). With a solver the step follows the hypergradient of E, δ being the maximiser of the
cross-entropy of the images that carry it; without one, the direct term alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import augment
from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import batches
from bdjax.defenses._smallest import ANY, Perturbations, largest, none, norms, search
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError
from bdjax.hypergrad import hypergradient, solver
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float

GROWTH = 3.0
"""Perturbations are unlearned at no more than so many times the radius that first led to their class."""
KEPT = 0.15
"""Share of a batch that are clean images of the suspicious classes."""


@dataclass(frozen=True)
class Search:
    """How the perturbations are searched, and which classes are suspicious."""

    steps: int = 30
    """Over all classes."""
    batch_size: int = 16
    """Images a step over all classes; 1.5 times as many when few classes are searched anew."""
    refresh_steps: int = 10
    """After each round."""
    largest_radius: float = 0.1
    """No perturbation has a larger L2 norm than one of this value in every pixel and channel."""
    threshold: float = 0.7
    """A class whose radius is below this share of the median is suspicious."""
    starts: int = 4
    """Perturbations that are unlearned together, shared by the suspicious classes."""


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
    patience: int = 5
    solver: str = "none"
    solver_iterations: int = 5
    solver_step: float = 0.1
    ridge: float = 0.0
    penalty: float = 1e-3
    """Weight of ‖δ‖² in the inner objective."""


def all_classes(search_: Search, victim: Victim, view: DefenderView, key: Key, name: str) -> Perturbations:
    """The smallest perturbation towards every class. Raises InputError for fewer than two images."""
    if len(view.labels) < 2:
        raise InputError(
            f"{name} got {len(view.labels)} clean images to learn from; it needs two at the least, and some hundred "
            "are better. Use a larger --split.size."
        )
    cap = largest(victim.model, search_.largest_radius)
    return search(
        victim.model, victim.variables, view.images, view.labels, none(victim.model, cap), search_.steps,
        search_.batch_size, cap, key, partial(view.watch.tick, "smallest perturbation of every class"),
    )  # fmt: skip


def scores(search_: Search, perturbations: Perturbations) -> Scores:
    """Per class the median radius over its own; the model is called poisoned above 1 / threshold."""
    classes = (np.median(perturbations.radii) / perturbations.radii).astype(np.float32)
    target = int(classes.argmax())
    return Scores(classes, target, float(classes[target]), bool(classes[target] > 1 / search_.threshold))


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
    shared: dict[str, Any] = {
        "images": jnp.asarray(view.images), "labels": jnp.asarray(view.labels), "victim": dict(victim.variables),
        **{name: jnp.float32(getattr(rounds, name)) for name in _DYNAMIC},
    }  # fmt: skip
    quiet, round_, variables = 0, 0, victim.variables
    while round_ < rounds.rounds and quiet < rounds.patience:
        round_key = jax.random.fold_in(jax.random.fold_in(key, 4), round_)
        split, carried = _batches(rounds, targeted, len(view.labels), round_key)
        shared |= {"deltas": targeted.enlarged(rounds.enlarged)}
        step = _step(model, rounds.solver, rounds.solver_iterations, carried)
        tick = partial(view.watch.tick, f"{rounds.name} round {round_ + 1} of at most {rounds.rounds}")
        state, metrics = run_epoch(step, state, split, {}, shared, tick=tick)
        check_finite(metrics["loss"], rounds.learning_rate, round_ * rounds.steps, "unlearning loss", rounds.rate_field)
        round_ += 1
        variables = {**victim.variables, "params": jax.tree.map(jnp.copy, state["params"])}
        targeted.refresh(variables, jax.random.fold_in(round_key, 9))
        quiet = quiet + 1 if targeted.radius >= 1 else 0
        view.watch.observe(round_, variables, perturbation=targeted.present.deltas, radius=jnp.float32(targeted.radius))
    return variables


class TargetedSearch:
    """The perturbations that lead to suspicious classes, searched anew as the model changes."""

    present: Perturbations
    """`starts` of them, in the present model."""

    def __init__(self, search_: Search, victim: Victim, view: DefenderView, key: Key, name: str) -> None:
        """Search all classes, tell the watch the verdict, and begin with several starts for each suspicious class.

        Args: as of :func:`unlearn`; name: of the defense, for messages.
        """
        self._search, self._model, self._view = search_, victim.model, view
        self._cap = largest(victim.model, search_.largest_radius)
        found = all_classes(search_, victim, view, jax.random.fold_in(key, 1), name)
        self.scores = scores(search_, found)
        view.watch.judge(self.scores)
        self._median = float(np.median(found.radii))
        self.present = _starts(search_, victim.model, found, jax.random.fold_in(key, 2))
        self._of_targets = np.flatnonzero(np.isin(view.labels, self.present.goals)).astype(np.int32)
        # a class that cannot be reached any more shall not be unlearned by ever larger perturbations
        self._bound = jnp.minimum(self._median, GROWTH * self.present.radii)[:, None, None, None]
        self._again(victim.variables, jax.random.fold_in(key, 3), 2 * search_.refresh_steps)

    @property
    def radius(self) -> float:
        """The smallest radius over the median of all classes in the given model; at least 1 where none leads there."""
        smallest = float(self.present.radii.min())
        return max(1.0, smallest / self._median) if smallest >= self._cap else smallest / self._median

    def enlarged(self, times: float) -> jax.Array:
        """The perturbations [starts, H, W, C] at `times` their radius, within their bound."""
        return self.present.deltas * jnp.minimum(times, self._bound / norms(self.present.deltas))

    def of_targets(self, key: Key, shape: tuple[int, int]) -> np.ndarray | None:
        """Positions of images of the suspicious classes, drawn with replacement: int32 `shape`; None if there are none.

        A share `KEPT` of every batch are such images, lest these classes be unlearned.
        """
        if not len(self._of_targets):
            return None
        # drawn by position: their number is then no part of a compiled program
        return self._of_targets[np.asarray(jax.random.randint(key, shape, 0, len(self._of_targets)))]

    def refresh(self, variables: Variables, key: Key) -> None:
        """Search them anew in a model, from 1.4 times their radius on; key: draws batches."""
        radii = np.minimum(1.4 * self.present.radii, self._cap).astype(np.float32)
        self.present = self.present._replace(radii=radii)
        self._again(variables, key, self._search.refresh_steps)

    def _again(self, variables: Variables, key: Key, steps: int) -> None:
        size = self._search.batch_size * 3 // 2
        self.present = search(
            self._model, variables, self._view.images, self._view.labels, self.present, steps, size, self._cap, key
        )


def _starts(search_: Search, model: Model, perturbations: Perturbations, key: Key) -> Perturbations:
    """`starts` perturbations of the suspicious classes: each class's own first, the others from random directions.

    Where no class is suspicious: of the nearest class, and in turn such as send images to any class but their own.
    """
    radii, number = perturbations.radii, search_.starts
    order = np.argsort(radii, kind="stable")
    suspicious = order[radii[order] < search_.threshold * np.median(radii)][:number]
    classes = np.resize(suspicious if len(suspicious) else order[:1], number)
    goals, begin = classes.astype(np.int32), radii[classes]
    if not len(suspicious):
        goals[1::2], begin[1::2] = ANY, np.median(radii)
    noise = jax.random.normal(key, (number, *model.shape))
    noise = noise / norms(noise) * (0.3 * begin)[:, None, None, None]
    first = np.arange(number) < max(1, len(suspicious))
    deltas = jnp.where(jnp.asarray(first)[:, None, None, None], perturbations.deltas[classes], noise)
    return Perturbations(goals, deltas, begin)


def _batches(rounds: Rounds, targeted: TargetedSearch, total: int, key: Key) -> tuple[dict[str, jax.Array], int]:
    """Of one round, each [steps, batch]: images, which perturbation each carries (0: none), and what is mixed; and how
    many images of a batch carry one. Of the others a share is of the suspicious classes."""
    size, starts = batch_of(rounds.batch_size, total), len(targeted.present.goals)
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


_DYNAMIC = ("learning_rate", "distillation", "solver_step", "ridge", "penalty")  # other values compile nothing new


@lru_cache(maxsize=16)
def _step(model: Model, solver_name: str, iterations: int, carried: int) -> Callable:
    """One step of θ, in the engine's form; `carried` images of a batch carry a perturbation."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        carries = split["which"] > 0
        shifted = augment.policy("crop_flip")(to_float(shared["images"][split["other"]]), split["key"])
        weight = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(split["key"])
        mixed = images + weight[:, None, None, None] * (shifted - images)
        wanted = jax.nn.softmax(model.logits(shared["victim"], mixed))
        devices = parallel.size(axis)

        def stamped(deltas: jax.Array) -> jax.Array:
            own = deltas[jnp.maximum(split["which"] - 1, 0)]
            return jnp.where(carries[:, None, None, None], jnp.clip(images + own, 0, 1), images)

        def outer(deltas: jax.Array, params: Any) -> jax.Array:
            """This device's share of E."""
            variables = {**shared["victim"], "params": params}
            logits = model.logits(variables, jnp.concatenate([stamped(deltas), mixed]))
            hard = optax.softmax_cross_entropy_with_integer_labels(logits[: len(images)], labels).mean()
            soft = optax.softmax_cross_entropy(logits[len(images) :], wanted).mean()
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
        return {"params": params, "opt": opt}, {"loss": value}

    return step
