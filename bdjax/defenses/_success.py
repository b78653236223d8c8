"""Whether a defense worked, without the trigger: what the triggers recovered from the model do to the cleaned one.

For the most suspicious class, and others close to it, two triggers are recovered from the model before the defense:
the smallest additive perturbation (:mod:`bdjax.defenses._smallest`) and the smallest patch (mask and pattern, as Neural
Cleanse's: Wang et al., IEEE S&P 2019). They are put on clean images of other classes that the defense did not learn
from, at several strengths, for an attacker's own trigger is stronger than the smallest one that works; the flip rate is
the largest share that the model calls by the trigger's class. The same triggers are recovered from the cleaned model
anew; one that is more than `LARGER` times as large as before is no sign of the old backdoor and counts as none. If a
far smaller patch sends images to any class but their own than to one class, triggers of that kind are recovered
instead; their flip rate is the share of errors beyond the share on clean images.

The estimate is the largest flip rate that is left. It is a lower bound of what an attacker can do with triggers of
these two forms, and says nothing of triggers that neither form expresses (experiments/foreign has how well it follows
the true ASR).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses import _patches, _targeted_search
from bdjax.defenses._smallest import ANY, Perturbations, largest, search
from bdjax.engine import predict
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float

LARGER = 1.5
"""A trigger recovered from the cleaned model counts if it is at most so many times as large as the one before."""
STRENGTHS = (1.2, 2.0, 3.0)
"""A recovered perturbation, or the mask of a recovered patch, is put on images at so many times its size."""
CLASSES = 3
"""Classes that triggers are recovered for, at most."""
NEAR = 0.8
"""Beside the most suspicious class those whose score exceeds 1 by this share of what its own does, as of an attack with
several targets. Triggers of other classes are natural: they work as well in a model without a backdoor."""


@dataclass(frozen=True)
class Flips:
    """One recovered trigger and what it does; rates in [0, 1]."""

    form: str
    """additive or patch."""
    label: int
    """The class that it leads to; -1: any but an image's own."""
    size: float
    """L2 norm of the perturbation, or sum of the mask, of the trigger recovered from the model before."""
    size_anew: float
    """The same of the trigger recovered from the cleaned model."""
    before: float
    """Flip rate of the first trigger in the model before."""
    after: float
    """Flip rate of the first trigger in the cleaned model."""
    anew: float
    """Flip rate of the trigger recovered from the cleaned model there; 0 where that is too large to count."""
    n: int
    """Images that the rates are of."""


@dataclass(frozen=True)
class Estimate:
    """The flip rates of all recovered triggers."""

    rate: float
    """Estimate of the attack success rate that is left, in [0, 1]: the largest of `after` and `anew`."""
    flips: tuple[Flips, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {"rate": self.rate, "flips": [asdict(flips) for flips in self.flips]}


class Recovered(NamedTuple):
    """Triggers of K classes recovered from one model."""

    labels: np.ndarray
    """int32 [K], or `_smallest.ANY`."""
    additive: np.ndarray
    """float32 [K, H, W, C]."""
    masks: np.ndarray
    """float32 [K, H, W, 1] in [0, 1]."""
    patterns: np.ndarray
    """float32 [K, H, W, C] in [0, 1]."""
    sizes: np.ndarray
    """float32 [2, K]: L2 norms of the perturbations, sums of the masks."""


def estimate(
    before: Recovered, victim: Victim, cleaned: Variables, view: DefenderView, judged: DefenderView, key: Key
) -> Estimate:
    """How much of a backdoor is left in the cleaned model.

    Args:
      before: what :func:`recover` found in the victim; cleaned: the variables after the defense.
      view: clean images [n, H, W, C] and labels [n] to recover triggers with; judged: others, to put them on.
      key: draws batches.
    """
    after = _recovered(Victim(victim.model, cleaned), before.labels, view, key)
    largest_sizes = _cap(victim.model), float(np.prod(victim.model.shape[:2]))
    rows = []
    for place, goal in enumerate(before.labels):
        of_others = judged.labels != goal
        images, labels = np.asarray(to_float(judged.images[of_others])), judged.labels[of_others]
        for form, name in enumerate(("additive", "patch")):
            rates = [
                _flipped(victim.model, variables, name, recovered, place, images, labels)
                for variables, recovered in (
                    (victim.variables, before), (cleaned, before), (cleaned, after),
                )
            ]  # fmt: skip
            sizes = float(before.sizes[form, place]), float(after.sizes[form, place])
            counts = sizes[1] <= LARGER * sizes[0] and sizes[1] < 0.999 * largest_sizes[form]
            rows.append(Flips(name, int(goal), *sizes, rates[0], rates[1], rates[2] if counts else 0.0, len(images)))
    return Estimate(max(max(row.after, row.anew) for row in rows), tuple(rows))


def suspicious(victim: Victim, view: DefenderView, key: Key) -> np.ndarray:
    """The classes that far smaller additive perturbations lead to than to others, int32 [K], K from 1 to `CLASSES`."""
    settings = _targeted_search.Search()
    perturbations = _targeted_search.all_classes(settings, victim, view, key, "the estimate of success")
    return most_suspicious(_targeted_search.scores(settings, perturbations))


def most_suspicious(scores: Scores) -> np.ndarray:
    """The classes of a verdict that triggers are recovered for, and `ANY`, of which :func:`recover` chooses: int32 [K].

    The first class and those close to it; where the model is not called poisoned, others are close to any.
    """
    values = np.nan_to_num(scores.classes, nan=-np.inf)
    ranked = np.argsort(-values, kind="stable")[:CLASSES].astype(np.int32)
    ranked = ranked[: max(1, np.isfinite(values[ranked]).sum())]  # a class that could not be judged has no trigger
    if scores.poisoned:
        highest = values[ranked[0]]
        ranked = ranked[values[ranked] >= min(1 + NEAR * (highest - 1), highest)]
    return np.append(ranked, np.int32(ANY))


def recover(victim: Victim, labels: np.ndarray, view: DefenderView, key: Key) -> Recovered:
    """The smallest additive perturbation and the smallest patch towards each of `labels` int32 [K].

    Args: victim: the model; labels: classes; with `ANY` among them, it alone if its patch is far smaller than those of
      the classes, else the classes whose patches are at most `LARGER` times as large as the smallest; view: clean
      images and labels; key: draws batches.
    """
    if ANY in labels and (labels != ANY).any():
        areas = _patches_of(victim, labels, view, jax.random.fold_in(key, 2)).areas
        smallest = areas[labels != ANY].min()
        to_any = areas[labels == ANY].min() < _targeted_search.SMALLER * smallest
        labels = labels[(labels == ANY) if to_any else (labels != ANY) & (areas <= LARGER * smallest)]
    return _recovered(victim, labels, view, key)


def _recovered(victim: Victim, labels: np.ndarray, view: DefenderView, key: Key) -> Recovered:
    settings, model = _targeted_search.Search(), victim.model
    cap, number = _cap(model), len(labels)
    start = Perturbations(labels, jnp.zeros((number, *model.shape)), np.full(number, cap, np.float32))
    size = settings.batch_size * 3 // 2
    additive = search(
        model, victim.variables, view.images, view.labels, start, settings.steps, size, cap, jax.random.fold_in(key, 0)
    )
    patches = _patches_of(victim, labels, view, jax.random.fold_in(key, 1))
    deltas = np.asarray(additive.deltas)
    sizes = np.stack([np.where(additive.radii < cap, np.sqrt((deltas**2).sum((1, 2, 3))), cap), patches.areas])
    return Recovered(labels, deltas, np.asarray(patches.masks), np.asarray(patches.patterns), sizes)


def _patches_of(victim: Victim, goals: np.ndarray, view: DefenderView, key: Key) -> _patches.Patches:
    tick = partial(view.callback.on_progress, "smallest patch of suspicious classes")
    return _patches.search(
        victim.model, victim.variables, view.images, view.labels, goals, _patches.STEPS, key, tick=tick
    )  # fmt: skip


def _cap(model: Model) -> float:
    return largest(model, _targeted_search.Search().largest_radius)


def _stamped(
    form: str, recovered: Recovered, place: int, images: np.ndarray, strength: float, cap: float
) -> np.ndarray:
    if form == "additive":
        # what is larger than any perturbation of the search leads to a class by nature
        strength = min(strength, max(1.0, cap / max(float(recovered.sizes[0, place]), 1e-9)))
        return np.clip(images + strength * recovered.additive[place], 0, 1)
    mask = np.minimum(strength * recovered.masks[place], 1)
    return (1 - mask) * images + mask * recovered.patterns[place]


def _flipped(
    model: Model, variables: Variables, form: str, recovered: Recovered, place: int, images: np.ndarray,
    labels: np.ndarray,
) -> float:  # fmt: skip
    """The largest flip rate of one trigger over all strengths; 0 without images."""
    if not len(images):
        return 0.0
    goal, cap = recovered.labels[place], _cap(model)

    def rate(shown: np.ndarray) -> float:
        predictions = np.asarray(predict(model, variables, shown))
        return float((predictions != labels if goal == ANY else predictions == goal).mean())

    natural = rate(images) if goal == ANY else 0.0
    return max(0.0, *(rate(_stamped(form, recovered, place, images, by, cap)) - natural for by in STRENGTHS))
