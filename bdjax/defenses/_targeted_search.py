"""The triggers that lead to suspicious classes, searched in a model and again as it changes.

Perturbations of small L2 norm (:mod:`bdjax.defenses._smallest`) tell which classes are suspicious; several of them,
from different starts, and patches of small area (:mod:`bdjax.defenses._patches`) are what a defense unlearns.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._patches import STEPS, Patches
from bdjax.defenses._patches import search as search_patches
from bdjax.defenses._smallest import ANY, Perturbations, largest, none, norms, search
from bdjax.errors import InputError
from bdjax.types import DefenderView, Key, Scores, Variables, Victim

GROWTH = 3.0
"""Perturbations are unlearned at no more than so many times the radius that first led to their class."""
NEAREST = 3
"""Classes that patches are searched for where none is suspicious."""
SMALLER = 0.8
"""A patch that sends images to any class but their own must have less than this share of the area that one to a class
has, to be taken for an all-to-all backdoor's: what leads to one class leads away from the others, too."""
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
    patches: int = 2
    """Patches that are unlearned beside them."""
    largest_patch: float = 0.3
    """A patch of more than this share of the image is not unlearned: the one before stays in its place."""


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
        search_.batch_size, cap, key, partial(view.callback.on_progress, "smallest perturbation of every class"),
    )  # fmt: skip


def scores(search_: Search, perturbations: Perturbations) -> Scores:
    """Per class the median radius over its own; the model is called poisoned above 1 / threshold."""
    classes = (np.median(perturbations.radii) / perturbations.radii).astype(np.float32)
    target = int(classes.argmax())
    return Scores(classes, target, float(classes[target]), bool(classes[target] > 1 / search_.threshold))


class TargetedSearch:
    """The perturbations and patches that lead to suspicious classes, searched anew as the model changes."""

    present: Perturbations
    """`starts` perturbations, in the present model."""
    patches: Patches
    """The patches, in the present model: none if the search has none."""
    goal: int
    """The most suspicious class, or `ANY`."""

    def __init__(self, search_: Search, victim: Victim, view: DefenderView, key: Key, name: str) -> None:
        """Search all classes, tell the watch the verdict, and begin with several starts for each suspicious class.

        Args: as of :func:`unlearn`; name: of the defense, for messages.
        """
        self._search, self._model, self._view = search_, victim.model, view
        self._cap = largest(victim.model, search_.largest_radius)
        self._largest_area = search_.largest_patch * float(np.prod(victim.model.shape[:2]))
        smallest = all_classes(search_, victim, view, jax.random.fold_in(key, 1), name)
        self._median = float(np.median(smallest.radii))
        suspicious = _suspicious(search_, smallest)
        nearest = np.argsort(smallest.radii, kind="stable")[:NEAREST].astype(np.int32)
        self.patches, self.goal = self._first_patches(victim.variables, suspicious, nearest, jax.random.fold_in(key, 4))
        self.scores = _towards(scores(search_, smallest), self.goal)
        view.callback.on_detection(self.scores)
        others = nearest[:1] if self.goal == ANY else np.array([self.goal], np.int32)
        self.present = _starts(search_.starts, smallest, suspicious, others, jax.random.fold_in(key, 2))
        self._of_targets = np.flatnonzero(np.isin(view.labels, self.present.goals)).astype(np.int32)
        # a class that cannot be reached any more shall not be unlearned by ever larger perturbations
        self._bound = jnp.minimum(self._median, GROWTH * self.present.radii)[:, None, None, None]
        self._refine(victim.variables, jax.random.fold_in(key, 3), 2 * search_.refresh_steps)
        self._areas = self.patches.areas

    @property
    def radius(self) -> float:
        """The smallest radius over the median of all classes in the given model; at least 1 where none leads there."""
        least = float(self.present.radii.min())
        return max(1.0, least / self._median) if least >= self._cap else least / self._median

    @property
    def nothing_small(self) -> bool:
        """Whether neither a small perturbation nor a small patch leads to a suspicious class any more."""
        return self.radius >= 1 and bool((self._areas > self._largest_area).all())

    @property
    def number(self) -> int:
        """Perturbations and patches together."""
        return len(self.present.goals) + len(self.patches.goals)

    def enlarged(self, times: float) -> jax.Array:
        """The perturbations [starts, H, W, C] at `times` their radius, within their bound."""
        return self.present.deltas * jnp.minimum(times, self._bound / norms(self.present.deltas))

    def triggers(self, times: float) -> tuple[jax.Array, jax.Array]:
        """Perturbations and patches at `times` their size; an image x becomes clip(k x + δ, 0, 1).

        Returns: k, float32 [T, H, W, 1], how much of the image is kept; δ, float32 [T, H, W, C], what is added.
        """
        deltas = self.enlarged(times)
        masks = jnp.minimum(times * self.patches.masks, 1)
        kept = jnp.concatenate([jnp.ones((*deltas.shape[:3], 1)), 1 - masks])
        return kept, jnp.concatenate([deltas, masks * self.patches.patterns])

    def of_targets(self, key: Key, shape: tuple[int, int]) -> np.ndarray | None:
        """Positions of images of the suspicious classes, drawn with replacement: int32 `shape`; None if there are none.

        A share `KEPT` of every batch are such images, lest these classes be unlearned.
        """
        if not len(self._of_targets):
            return None
        # drawn by position: their number is then no part of a compiled program
        return self._of_targets[np.asarray(jax.random.randint(key, shape, 0, len(self._of_targets)))]

    def refresh(self, variables: Variables, key: Key) -> None:
        """Search them anew in a model, perturbations from 1.4 times their radius on; key: draws batches."""
        radii = np.minimum(1.4 * self.present.radii, self._cap).astype(np.float32)
        self.present = self.present._replace(radii=radii)
        self._refine(variables, key, self._search.refresh_steps)
        if not len(self.patches.goals):
            return
        steps, before = 2 * self._search.refresh_steps, self.patches
        anew = self._patches_of(variables, before.goals, steps, jax.random.fold_in(key, 1), before)
        self._areas = anew.areas
        too_large = jnp.asarray(anew.areas > self._largest_area)[:, None, None, None]
        self.patches = anew._replace(
            masks=jnp.where(too_large, before.masks, anew.masks),
            patterns=jnp.where(too_large, before.patterns, anew.patterns),
        )

    def _first_patches(
        self, variables: Variables, suspicious: np.ndarray, nearest: np.ndarray, key: Key
    ) -> tuple[Patches, int]:
        """The patches that are unlearned and what they lead to: the suspicious classes, or where there is none the
        nearest ones of the smallest patches; any class, if a far smaller patch sends images away from their own."""
        number = self._search.patches
        if not number:
            shape = self._model.shape
            nothing = Patches(np.zeros(0, np.int32), jnp.zeros((0, *shape[:2], 1)), jnp.zeros((0, *shape)), np.zeros(0))
            return nothing, int(suspicious[0] if len(suspicious) else nearest[0])
        classes = np.resize(suspicious, number) if len(suspicious) else nearest
        goals = np.append(classes, np.int32(ANY))
        patches = self._patches_of(variables, goals, STEPS, key, None)
        if patches.areas[-1] < SMALLER * patches.areas[:-1].min():
            goals = np.full(number, ANY, np.int32)
            return self._patches_of(variables, goals, STEPS, jax.random.fold_in(key, 1), None), ANY
        some = np.arange(number) if len(suspicious) else np.argsort(patches.areas[:-1], kind="stable")[:number]
        chosen = Patches(goals[some], patches.masks[some], patches.patterns[some], patches.areas[some])
        return chosen, int(suspicious[0] if len(suspicious) else goals[some[0]])

    def _patches_of(
        self, variables: Variables, goals: np.ndarray, steps: int, key: Key, start: Patches | None
    ) -> Patches:
        tick = partial(self._view.callback.on_progress, "smallest patch of suspicious classes")
        images, labels = self._view.images, self._view.labels
        return search_patches(self._model, variables, images, labels, goals, steps, key, start, tick)

    def _refine(self, variables: Variables, key: Key, steps: int) -> None:
        size = self._search.batch_size * 3 // 2
        self.present = search(
            self._model, variables, self._view.images, self._view.labels, self.present, steps, size, self._cap, key
        )


def _suspicious(search_: Search, perturbations: Perturbations) -> np.ndarray:
    """The classes whose radius is below the threshold, nearest first, at most `starts`; int32."""
    radii = perturbations.radii
    order = np.argsort(radii, kind="stable")
    return order[radii[order] < search_.threshold * np.median(radii)][: search_.starts].astype(np.int32)


def _towards(scores_: Scores, goal: int) -> Scores:
    """The scores with another class as the target, if it is one."""
    return scores_ if goal == ANY else replace(scores_, target=goal, score=float(scores_.classes[goal]))


def _starts(
    number: int, perturbations: Perturbations, suspicious: np.ndarray, others: np.ndarray, key: Key
) -> Perturbations:
    """`number` perturbations of the suspicious classes: each class's own first, the others from random directions.

    Where no class is suspicious: of `others`, and in turn such as send images to any class but their own.
    """
    radii = perturbations.radii
    classes = np.resize(suspicious if len(suspicious) else others, number)
    goals, begin = classes.astype(np.int32), radii[classes]
    if not len(suspicious):
        goals[1::2], begin[1::2] = ANY, np.median(radii)
    noise = jax.random.normal(key, (number, *perturbations.deltas.shape[1:]))
    noise = noise / norms(noise) * (0.3 * begin)[:, None, None, None]
    first = np.arange(number) < max(1, len(suspicious))
    deltas = jnp.where(jnp.asarray(first)[:, None, None, None], perturbations.deltas[classes], noise)
    return Perturbations(goals, deltas, begin)
