"""Estimate whether a defense removed the backdoor, without the true trigger, from triggers recovered from the model.

Two triggers are recovered from the model before the defense, for the most suspicious class and others with a similar
score: the smallest additive perturbation (:mod:`bdjax.defenses._smallest`) and the smallest patch (mask and pattern, as
in Neural Cleanse: Wang et al., IEEE S&P 2019). They are put on clean images of other classes that the defense did not
train on, at several strengths, because the attacker's own trigger is stronger than the smallest one that succeeds. The
flip rate is the largest fraction of these images that the model assigns to the trigger's class.

The same kinds of triggers are recovered again from the purified model. A trigger more than `MAX_SIZE_RATIO` times as
large as before is no evidence of the old backdoor and counts as none. If a much smaller patch sends images to any class
other than their own than to a single class, triggers with that goal are recovered instead; their flip rate is the error
rate minus the error rate on clean images.

The estimate is the largest flip rate that remains. It is a lower bound of what an attacker can do with triggers of
these two forms, and it says nothing about triggers that neither form can express (experiments/foreign reports how well
it follows the true ASR).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses import _patches, _targeted_search
from bdjax.defenses._smallest import ANY, Perturbations, norm_limit, search
from bdjax.engine import predict
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float

MAX_SIZE_RATIO = 1.5
"""Largest size of a trigger recovered from the purified model, relative to the one before, at which it still counts."""
STRENGTHS = (1.2, 2.0, 3.0)
"""Factors by which a recovered perturbation, or the mask of a recovered patch, is enlarged before it is put on
images."""
MAX_CLASSES = 3
"""Largest number of classes for which triggers are recovered."""
NEAR_SCORE = 0.8
"""Classes are included when the excess of their score over 1 is at least this fraction of the most suspicious class's,
as for an attack with several targets. Triggers of other classes are natural: they work equally well in a clean
model."""


@dataclass(frozen=True)
class TriggerEffect:
    """One recovered trigger and its flip rates, in [0, 1]."""

    form: str
    """"additive" or "patch"."""
    label: int
    """The target class; -1: any class other than the image's own."""
    size: float
    """L2 norm of the perturbation, or sum of the mask, of the trigger recovered from the model before."""
    size_anew: float
    """The same for the trigger recovered from the purified model."""
    before: float
    """Flip rate of the first trigger in the model before."""
    after: float
    """Flip rate of the first trigger in the purified model."""
    anew: float
    """Flip rate, in the purified model, of the trigger recovered from it; 0 when that trigger is too large to count."""
    n: int
    """Number of images on which the rates are measured."""


@dataclass(frozen=True)
class Estimate:
    """The estimated attack success rate and the flip rates of all recovered triggers."""

    rate: float
    """Estimate of the remaining attack success rate, in [0, 1]: the largest of `after` and `anew`."""
    flips: tuple[TriggerEffect, ...]
    """One entry per recovered trigger."""

    def plain(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return {"rate": self.rate, "flips": [asdict(flips) for flips in self.flips]}


class Recovered(NamedTuple):
    """Triggers for K goals, recovered from one model."""

    labels: np.ndarray
    """int32 [K], target classes, or `_smallest.ANY`."""
    additive: np.ndarray
    """float32 [K, H, W, C], perturbations."""
    masks: np.ndarray
    """float32 [K, H, W, 1] in [0, 1]."""
    patterns: np.ndarray
    """float32 [K, H, W, C] in [0, 1]."""
    sizes: np.ndarray
    """float32 [2, K]: L2 norms of the perturbations, sums of the masks."""


def estimate(
    before: Recovered, victim: Victim, purified: Variables, view: DefenderView, held_out: DefenderView, key: Key
) -> Estimate:
    """Estimate the remaining attack success rate of a purified model.

    Args:
      before: the triggers that :func:`recover` found in the victim.
      victim: the model before the defense.
      purified: the variables after the defense.
      view: clean images (stored [n, H, W, C]) and labels [n] to recover triggers with.
      held_out: other clean images, on which the triggers are tested.
      key: draws the batches.

    Returns:
      The estimate, with the flip rates of each trigger.
    """
    recovered_again = _recover_triggers(Victim(victim.model, purified), before.labels, view, key)
    size_limits = _max_radius(victim.model), float(np.prod(victim.model.shape[:2]))
    effects = []
    for position, goal in enumerate(before.labels):
        other_classes = held_out.labels != goal
        images, labels = np.asarray(to_float(held_out.images[other_classes])), held_out.labels[other_classes]
        for form_index, form in enumerate(("additive", "patch")):
            flip_rates = [
                _flip_rate(victim.model, variables, form, recovered, position, images, labels)
                for variables, recovered in (
                    (victim.variables, before), (purified, before), (purified, recovered_again),
                )
            ]  # fmt: skip
            sizes = float(before.sizes[form_index, position]), float(recovered_again.sizes[form_index, position])
            is_small_enough = sizes[1] <= MAX_SIZE_RATIO * sizes[0] and sizes[1] < 0.999 * size_limits[form_index]
            effects.append(
                TriggerEffect(
                    form,
                    int(goal),
                    *sizes,
                    flip_rates[0],
                    flip_rates[1],
                    flip_rates[2] if is_small_enough else 0.0,
                    len(images),
                )
            )
    return Estimate(max(max(effect.after, effect.anew) for effect in effects), tuple(effects))


def suspicious(victim: Victim, view: DefenderView, key: Key) -> np.ndarray:
    """Find the classes to which much smaller additive perturbations lead than to the other classes.

    Args:
      victim: the model.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the batches.

    Returns:
      As :func:`most_suspicious`.
    """
    settings = _targeted_search.Search()
    perturbations = _targeted_search.search_all_classes(settings, victim, view, key, "the estimate of success")
    return most_suspicious(_targeted_search.scores(settings, perturbations))


def most_suspicious(scores: Scores) -> np.ndarray:
    """Choose from a detector's scores the goals for which triggers are recovered.

    These are the highest-scoring class and the classes with similar scores, at most `MAX_CLASSES`. When the model is
    judged clean, all classes are taken, because a small patch need not be near in the L2 norm.

    Args:
      scores: the scores of all classes.

    Returns:
      int32 [K + 1]: K classes, highest score first, and `ANY`; :func:`recover` chooses between them.
    """
    class_scores = np.nan_to_num(scores.classes, nan=-np.inf)
    ranked = np.argsort(-class_scores, kind="stable").astype(np.int32)
    # a class that could not be judged has no trigger
    ranked = ranked[: max(1, int(np.isfinite(class_scores).sum()))]
    if scores.poisoned:
        highest_score = class_scores[ranked[0]]
        ranked = ranked[class_scores[ranked] >= min(1 + NEAR_SCORE * (highest_score - 1), highest_score)][:MAX_CLASSES]
    return np.append(ranked, np.int32(ANY))


def recover(victim: Victim, labels: np.ndarray, view: DefenderView, key: Key) -> Recovered:
    """Recover the smallest additive perturbation and the smallest patch for each goal.

    With `ANY` among the goals, only `ANY` is used if its patch is much smaller than those of the classes; otherwise
    the classes whose patches are at most `MAX_SIZE_RATIO` times as large as the smallest one, at most `MAX_CLASSES`.

    Args:
      victim: the model.
      labels: int32 [K], the goals.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the batches.

    Returns:
      The triggers of the goals that were used.
    """
    if ANY in labels and (labels != ANY).any():
        areas = _search_patches(victim, labels, view, jax.random.fold_in(key, 2)).areas
        smallest_area = areas[labels != ANY].min()
        to_any = areas[labels == ANY].min() < _targeted_search.ANY_CLASS_AREA_RATIO * smallest_area
        near = np.flatnonzero((labels != ANY) & (areas <= MAX_SIZE_RATIO * smallest_area))
        near = near[np.argsort(areas[near], kind="stable")]
        labels = np.array([ANY], np.int32) if to_any else labels[near[:MAX_CLASSES]]
    return _recover_triggers(victim, labels, view, key)


def _recover_triggers(victim: Victim, labels: np.ndarray, view: DefenderView, key: Key) -> Recovered:
    """Search both kinds of triggers for all goals."""
    settings, model = _targeted_search.Search(), victim.model
    cap, count = _max_radius(model), len(labels)
    start = Perturbations(labels, jnp.zeros((count, *model.shape)), np.full(count, cap, np.float32))
    batch_size = settings.batch_size * 3 // 2
    additive = search(
        model,
        victim.variables,
        view.images,
        view.labels,
        start,
        settings.steps,
        batch_size,
        cap,
        jax.random.fold_in(key, 0),
    )
    patches = _search_patches(victim, labels, view, jax.random.fold_in(key, 1))
    deltas = np.asarray(additive.deltas)
    sizes = np.stack([np.where(additive.radii < cap, np.sqrt((deltas**2).sum((1, 2, 3))), cap), patches.areas])
    return Recovered(labels, deltas, np.asarray(patches.masks), np.asarray(patches.patterns), sizes)


def _search_patches(victim: Victim, goals: np.ndarray, view: DefenderView, key: Key) -> _patches.Patches:
    """Search the smallest patch for each goal."""
    tick = partial(view.callback.on_progress, "smallest patch of suspicious classes")
    return _patches.search(
        victim.model, victim.variables, view.images, view.labels, goals, _patches.STEPS, key, tick=tick
    )  # fmt: skip


def _max_radius(model: Model) -> float:
    """Return the largest L2 radius of a perturbation."""
    return norm_limit(model, _targeted_search.Search().largest_radius)


def _stamp(
    form: str, recovered: Recovered, position: int, images: np.ndarray, strength: float, max_radius: float
) -> np.ndarray:
    """Put one recovered trigger on images, enlarged by `strength`."""
    if form == "additive":
        # what is larger than any perturbation of the search leads to a class by nature
        strength = min(strength, max(1.0, max_radius / max(float(recovered.sizes[0, position]), 1e-9)))
        return np.clip(images + strength * recovered.additive[position], 0, 1)
    mask = np.minimum(strength * recovered.masks[position], 1)
    return (1 - mask) * images + mask * recovered.patterns[position]


def _flip_rate(
    model: Model, variables: Variables, form: str, recovered: Recovered, position: int, images: np.ndarray,
    labels: np.ndarray,
) -> float:  # fmt: skip
    """Largest flip rate of one trigger over all strengths; 0 without images."""
    if not len(images):
        return 0.0
    goal, max_radius = recovered.labels[position], _max_radius(model)

    def success_rate(stamped: np.ndarray) -> float:
        predictions = np.asarray(predict(model, variables, stamped))
        return float((predictions != labels if goal == ANY else predictions == goal).mean())

    natural_rate = success_rate(images) if goal == ANY else 0.0
    return max(
        0.0,
        *(
            success_rate(_stamp(form, recovered, position, images, strength, max_radius)) - natural_rate
            for strength in STRENGTHS
        ),
    )
