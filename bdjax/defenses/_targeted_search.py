"""The triggers that send images to suspicious classes, searched in a model and again as the model changes.

Perturbations of small L2 norm (:mod:`bdjax.defenses._smallest`) determine which classes are suspicious. A defense
unlearns several of them, from different starts, together with patches of small area (:mod:`bdjax.defenses._patches`).
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._patches import STEPS, Patches
from bdjax.defenses._patches import search as search_patches
from bdjax.defenses._smallest import ANY, Perturbations, l2_norms, norm_limit, search, zero_perturbations
from bdjax.errors import InputError
from bdjax.types import DefenderView, Key, Scores, Variables, Victim

MAX_GROWTH = 3.0
"""Largest radius at which a perturbation is unlearned, as a multiple of the initial radius for its class."""
ANY_CLASS_AREA_RATIO = 0.8
"""Largest area of a patch with the goal `ANY`, relative to the smallest patch to a single class, at which the backdoor
is taken for an all-to-all one. The ratio is below 1 because a patch to one class also moves images out of their own
class."""
PATCH_THRESHOLD = 0.5
"""Area of its smallest patch, relative to the median of all classes, below which a class is suspicious."""
RADIUS_SPREAD, AREA_SPREAD = 0.15, 0.45
"""Typical standard deviations of log radius and log area between the classes of a clean model
(:mod:`bdjax.detectors.additive`, :mod:`bdjax.detectors.patch`)."""
TARGET_CLASS_SHARE = 0.15
"""Fraction of a batch that consists of clean images of the suspicious classes."""


@dataclass(frozen=True)
class Search:
    """Hyper-parameters of the search for triggers and of the suspicion of classes."""

    steps: int = 30
    """Steps of the search over all classes."""
    batch_size: int = 16
    """Images per step over all classes; 1.5 times as many when a few classes are searched again."""
    refresh_steps: int = 10
    """Steps of the search after each round."""
    largest_radius: float = 0.1
    """Upper bound of the L2 norm, given as the value of a constant perturbation with that norm, in units of [0, 1]."""
    threshold: float = 0.7
    """A class is suspicious when its radius is below this fraction of the median."""
    starts: int = 4
    """Number of perturbations that are unlearned together, shared by the suspicious classes."""
    patches: int = 2
    """Number of patches that are unlearned with them; where more classes are suspicious, one for each. 0: none."""
    largest_patch: float = 0.3
    """Largest area of an unlearned patch, as a fraction of the image; the previous patch is used in place of a larger
    one."""


def search_all_classes(settings: Search, victim: Victim, view: DefenderView, key: Key, method: str) -> Perturbations:
    """Search the smallest perturbation for every class.

    Args:
      settings: hyper-parameters of the search.
      victim: the model.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the batches.
      method: name of the defense, for the message.

    Returns:
      One perturbation per class.

    Raises:
      InputError: when there are fewer than two images.
    """
    if len(view.labels) < 2:
        raise InputError(
            f"{method} got {len(view.labels)} clean images to learn from; it needs two at the least, and some hundred "
            "are better. Use a larger --split.size."
        )
    cap = norm_limit(victim.model, settings.largest_radius)
    return search(
        victim.model, victim.variables, view.images, view.labels, zero_perturbations(victim.model, cap), settings.steps,
        settings.batch_size, cap, key, partial(view.callback.on_progress, "smallest perturbation of every class"),
    )  # fmt: skip


def scores(settings: Search, perturbations: Perturbations) -> Scores:
    """Score each class by the median radius divided by its own; a score above 1 / threshold means backdoored."""
    classes = (np.median(perturbations.radii) / perturbations.radii).astype(np.float32)
    target = int(classes.argmax())
    return Scores(classes, target, float(classes[target]), bool(classes[target] > 1 / settings.threshold))


class TargetedSearch:
    """The perturbations and patches for suspicious classes, searched again as the model changes."""

    perturbations: Perturbations
    """The perturbations, for the current model."""
    patches: Patches
    """The patches, for the current model; none when `Search.patches` is 0."""
    goal: int
    """The most suspicious class, or `ANY`."""

    def __init__(self, settings: Search, victim: Victim, view: DefenderView, key: Key, method: str) -> None:
        """Search all classes, report the scores to the callback, and start several perturbations per suspicious class.

        Args:
          settings: hyper-parameters of the search.
          victim: the given model.
          view: clean images (stored [n, H, W, C]) and labels [n].
          key: draws batches and initial perturbations.
          method: name of the defense, for messages.
        """
        self._settings, self._model, self._view = settings, victim.model, view
        self._cap = norm_limit(victim.model, settings.largest_radius)
        self._largest_area = settings.largest_patch * float(np.prod(victim.model.shape[:2]))
        smallest = search_all_classes(settings, victim, view, jax.random.fold_in(key, 1), method)
        self._median = float(np.median(smallest.radii))
        suspicious, self.goal, patch_goals = self._choose_goals(victim.variables, smallest, jax.random.fold_in(key, 4))
        self.patches = self._search_patches(victim.variables, patch_goals, STEPS, jax.random.fold_in(key, 5), None)
        self.scores = _with_target(scores(settings, smallest), self.goal)
        view.callback.on_detection(self.scores)
        others = np.array([np.argmin(smallest.radii) if self.goal == ANY else self.goal], np.int32)
        self.perturbations = _initial_perturbations(
            settings.starts, smallest, suspicious, others, jax.random.fold_in(key, 2)
        )
        self._target_images = np.flatnonzero(np.isin(view.labels, self.perturbations.goals)).astype(np.int32)
        # a class that cannot be reached any more must not be unlearned by ever larger perturbations
        self._norm_bound = jnp.minimum(self._median, MAX_GROWTH * self.perturbations.radii)[:, None, None, None]
        self._refine(victim.variables, jax.random.fold_in(key, 3), 2 * settings.refresh_steps)
        self._areas = self.patches.areas

    @property
    def relative_radius(self) -> float:
        """The smallest radius divided by the initial median of all classes; at least 1 if no perturbation succeeds."""
        least = float(self.perturbations.radii.min())
        return max(1.0, least / self._median) if least >= self._cap else least / self._median

    @property
    def is_exhausted(self) -> bool:
        """Whether neither a small perturbation nor a small patch leads to a suspicious class any more."""
        return self.relative_radius >= 1 and bool((self._areas > self._largest_area).all())

    @property
    def trigger_count(self) -> int:
        """Number of perturbations and patches together."""
        return len(self.perturbations.goals) + len(self.patches.goals)

    def scaled_perturbations(self, factor: float) -> jax.Array:
        """Return the perturbations [starts, H, W, C] scaled by `factor`, within their norm bound."""
        return self.perturbations.deltas * jnp.minimum(factor, self._norm_bound / l2_norms(self.perturbations.deltas))

    def triggers(self, factor: float) -> tuple[jax.Array, jax.Array]:
        """Return the triggers enlarged by `factor`, as affine maps: an image x becomes clip(k x + δ, 0, 1).

        The perturbations come first, then the patches.

        Returns:
          k, float32 [T, H, W, 1], the fraction of each pixel that remains; δ, float32 [T, H, W, C], which is added.
        """
        deltas = self.scaled_perturbations(factor)
        masks = jnp.minimum(factor * self.patches.masks, 1)
        kept_fractions = jnp.concatenate([jnp.ones((*deltas.shape[:3], 1)), 1 - masks])
        return kept_fractions, jnp.concatenate([deltas, masks * self.patches.patterns])

    def draw_target_images(self, key: Key, shape: tuple[int, int]) -> np.ndarray | None:
        """Draw positions of images of the suspicious classes, with replacement.

        A fixed share of every batch consists of such images, so that these classes are not unlearned.

        Args:
          key: random key.
          shape: shape of the result.

        Returns:
          int32 of the given shape, or None when the view has no such image.
        """
        if not len(self._target_images):
            return None
        # drawn by position, so that their number is not part of a compiled program
        return self._target_images[np.asarray(jax.random.randint(key, shape, 0, len(self._target_images)))]

    def refresh(self, variables: Variables, key: Key) -> None:
        """Search all triggers again in a changed model.

        Args:
          variables: of the changed model. Perturbations start at 1.4 times their radius.
          key: draws the batches.
        """
        radii = np.minimum(1.4 * self.perturbations.radii, self._cap).astype(np.float32)
        self.perturbations = self.perturbations._replace(radii=radii)
        self._refine(variables, key, self._settings.refresh_steps)
        if not len(self.patches.goals):
            return
        steps, previous = 2 * self._settings.refresh_steps, self.patches
        updated = self._search_patches(variables, previous.goals, steps, jax.random.fold_in(key, 1), previous)
        self._areas = updated.areas
        is_too_large = jnp.asarray(updated.areas > self._largest_area)[:, None, None, None]
        self.patches = updated._replace(
            masks=jnp.where(is_too_large, previous.masks, updated.masks),
            patterns=jnp.where(is_too_large, previous.patterns, updated.patterns),
        )

    def _choose_goals(
        self, variables: Variables, smallest: Perturbations, key: Key
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """Choose the classes that triggers are searched for, by their perturbations and by the patches of all classes.

        A small patch need not be near in the L2 norm: classes with a patch below `PATCH_THRESHOLD` of the median are
        suspicious, too. When a much smaller patch sends images to any class other than their own, all patches have the
        goal `ANY`.

        Args:
          variables: of the given model.
          smallest: the smallest perturbation of every class.
          key: draws batches and patterns.

        Returns:
          The suspicious classes, most suspicious first, int32 [S], S >= 0; the goal, a class or `ANY`; the goals of the
          patches, int32, `Search.patches` of them or one per suspicious class.
        """
        count, relative_radii = self._settings.patches, smallest.radii / np.median(smallest.radii)
        suspicious = _suspicious_classes(self._settings, smallest)
        if not count:
            return suspicious, int(np.argmin(relative_radii)), np.zeros(0, np.int32)
        goals = np.append(np.arange(self._model.classes), ANY).astype(np.int32)
        areas = self._search_patches(variables, goals, STEPS, key, None).areas
        smallest_first, relative_areas = np.argsort(areas[:-1], kind="stable"), areas[:-1] / np.median(areas[:-1])
        if areas[-1] < ANY_CLASS_AREA_RATIO * areas[smallest_first[0]]:
            return suspicious, ANY, np.full(count, ANY, np.int32)
        has_small_patch = relative_areas < PATCH_THRESHOLD
        suspicious = np.union1d(suspicious, np.flatnonzero(has_small_patch)).astype(np.int32)
        if not len(suspicious):
            return suspicious, int(smallest_first[0]), smallest_first[:count].astype(np.int32)
        evidence = -np.minimum(np.log(relative_radii) / RADIUS_SPREAD, np.log(relative_areas) / AREA_SPREAD)
        suspicious = suspicious[np.argsort(-evidence[suspicious], kind="stable")][: self._settings.starts]
        return suspicious, int(suspicious[0]), np.resize(suspicious, max(count, len(suspicious)))

    def _search_patches(
        self, variables: Variables, goals: np.ndarray, steps: int, key: Key, start: Patches | None
    ) -> Patches:
        """Search patches in a model, from the given ones or from scratch; none when there are no goals."""
        if not len(goals):
            shape = self._model.shape
            return Patches(goals, jnp.zeros((0, *shape[:2], 1)), jnp.zeros((0, *shape)), np.zeros(0, np.float32))
        tick = partial(self._view.callback.on_progress, "smallest patch of suspicious classes")
        images, labels = self._view.images, self._view.labels
        return search_patches(self._model, variables, images, labels, goals, steps, key, start, tick)

    def _refine(self, variables: Variables, key: Key, steps: int) -> None:
        """Continue the search of the perturbations in a model."""
        size, images, labels = self._settings.batch_size * 3 // 2, self._view.images, self._view.labels
        self.perturbations = search(
            self._model, variables, images, labels, self.perturbations, steps, size, self._cap, key
        )


def _suspicious_classes(settings: Search, perturbations: Perturbations) -> np.ndarray:
    """Return the classes whose radius is below the threshold, smallest radius first, at most `starts`; int32."""
    radii = perturbations.radii
    order = np.argsort(radii, kind="stable")
    return order[radii[order] < settings.threshold * np.median(radii)][: settings.starts].astype(np.int32)


def _with_target(scores: Scores, goal: int) -> Scores:
    """Return the scores with `goal` as the target class; unchanged when the goal is `ANY`."""
    return scores if goal == ANY else replace(scores, target=goal, score=float(scores.classes[goal]))


def _initial_perturbations(
    count: int, perturbations: Perturbations, suspicious: np.ndarray, fallback: np.ndarray, key: Key
) -> Perturbations:
    """Return `count` perturbations for the suspicious classes.

    The first one of each class is the result of the search, the others start in random directions. When no class is
    suspicious, they lead alternately to a class of `fallback` and to any class other than the image's own.
    """
    radii = perturbations.radii
    classes = np.resize(suspicious if len(suspicious) else fallback, count)
    goals, initial_radii = classes.astype(np.int32), radii[classes]
    if not len(suspicious):
        goals[1::2], initial_radii[1::2] = ANY, np.median(radii)
    noise = jax.random.normal(key, (count, *perturbations.deltas.shape[1:]))
    noise = noise / l2_norms(noise) * (0.3 * initial_radii)[:, None, None, None]
    is_search_result = np.arange(count) < max(1, len(suspicious))
    deltas = jnp.where(jnp.asarray(is_search_result)[:, None, None, None], perturbations.deltas[classes], noise)
    return Perturbations(goals, deltas, initial_radii)
