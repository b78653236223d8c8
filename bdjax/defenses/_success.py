"""Whether a defense worked, without the trigger: what the triggers recovered from the model do to the cleaned one.

For the most suspicious class, and others close to it, two triggers are recovered from the model before the defense:
the smallest additive perturbation (:mod:`bdjax.defenses._smallest`) and the smallest patch (mask and pattern, as Neural
Cleanse's: Wang et al., IEEE S&P 2019). They are put on clean images of other classes that the defense did not learn
from, at several strengths, for an attacker's own trigger is stronger than the smallest one that works; the flip rate is
the largest share that the model calls by the trigger's class. The same triggers are recovered from the cleaned model
anew; one that is more than `LARGER` times as large as before is no sign of the old backdoor and counts as none.

The estimate is the largest flip rate that is left. It is a lower bound of what an attacker can do with triggers of
these two forms, and says nothing of triggers that neither form expresses (experiments/foreign has how well it follows
the true ASR).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses import _targeted
from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import batches
from bdjax.defenses._smallest import Perturbations, counted, hinge, largest, search
from bdjax.engine import parallel, predict, run_epoch
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float

LARGER = 1.5
"""A trigger recovered from the cleaned model counts if it is at most so many times as large as the one before."""
STRENGTHS = (1.2, 2.0, 3.0)
"""A recovered perturbation, or the mask of a recovered patch, is put on images at so many times its size."""
CLASSES = 3
"""Classes that triggers are recovered for, at most."""
NEAR = 0.8
"""Beside the most suspicious class those whose score is this share of its own, as of an attack with several targets.
Triggers of other classes are natural: they work as well in a model without a backdoor."""
_PATCH_STEPS, _PATCH_BATCH, _PATCH_RATE = 80, 24, 0.2
_WORKS = 0.8  # share of the images a patch must send to its class to be kept


@dataclass(frozen=True)
class Flips:
    """One recovered trigger and what it does; rates in [0, 1]."""

    form: str
    """additive or patch."""
    label: int
    """The class that it leads to."""
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
    """int32 [K]."""
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
    after = recover(Victim(victim.model, cleaned), before.labels, view, key)
    images, labels = np.asarray(to_float(judged.images)), judged.labels
    rows = []
    for place, goal in enumerate(before.labels):
        others = images[labels != goal]
        for form, name in enumerate(("additive", "patch")):
            rates = [
                _flipped(victim.model, variables, name, recovered, place, others)
                for variables, recovered in (
                    (victim.variables, before), (cleaned, before), (cleaned, after),
                )
            ]  # fmt: skip
            sizes = float(before.sizes[form, place]), float(after.sizes[form, place])
            anew = rates[2] if sizes[1] <= LARGER * sizes[0] else 0.0
            rows.append(Flips(name, int(goal), *sizes, rates[0], rates[1], anew, len(others)))
    return Estimate(max(max(row.after, row.anew) for row in rows), tuple(rows))


def suspicious(victim: Victim, view: DefenderView, key: Key) -> np.ndarray:
    """The classes that far smaller additive perturbations lead to than to others, int32 [K], K from 1 to `CLASSES`."""
    settings = _targeted.Search()
    found = _targeted.all_classes(settings, victim, view, key, "the estimate of success")
    return most_suspicious(_targeted.scores(settings, found))


def most_suspicious(scores: Scores) -> np.ndarray:
    """The classes of a verdict that triggers are recovered for, int32 [K]: the first, and those close to it; where the
    model is not called poisoned the first alone, for then others are close to any."""
    values = np.nan_to_num(scores.classes, nan=-np.inf)
    ranked = np.argsort(-values, kind="stable")[: CLASSES if scores.poisoned else 1]
    return ranked[values[ranked] >= min(NEAR * values[ranked[0]], values[ranked[0]])].astype(np.int32)


def recover(victim: Victim, labels: np.ndarray, view: DefenderView, key: Key) -> Recovered:
    """The smallest additive perturbation and the smallest patch towards each of `labels` int32 [K].

    Args: victim: the model; view: clean images and labels; key: draws batches.
    """
    settings, model = _targeted.Search(), victim.model
    cap, number = largest(model, settings.largest_radius), len(labels)
    start = Perturbations(labels, jnp.zeros((number, *model.shape)), np.full(number, cap, np.float32))
    size = settings.batch_size * 3 // 2
    additive = search(
        model, victim.variables, view.images, view.labels, start, settings.steps, size, cap, jax.random.fold_in(key, 0)
    )
    masks, patterns, areas = _patches(victim, labels, view, jax.random.fold_in(key, 1))
    deltas = np.asarray(additive.deltas)
    sizes = np.stack([np.sqrt((deltas**2).sum((1, 2, 3))), areas])
    return Recovered(labels, deltas, masks, patterns, sizes)


def _stamped(form: str, recovered: Recovered, place: int, images: np.ndarray, strength: float) -> np.ndarray:
    if form == "additive":
        return np.clip(images + strength * recovered.additive[place], 0, 1)
    mask = np.minimum(strength * recovered.masks[place], 1)
    return (1 - mask) * images + mask * recovered.patterns[place]


def _flipped(
    model: Model, variables: Variables, form: str, recovered: Recovered, place: int, images: np.ndarray
) -> float:
    """The largest flip rate of one trigger over all strengths; 0 without images."""
    if not len(images):
        return 0.0
    goal, stronger = recovered.labels[place], [_stamped(form, recovered, place, images, by) for by in STRENGTHS]
    return max(float((np.asarray(predict(model, variables, stamped)) == goal).mean()) for stamped in stronger)


def _patches(victim: Victim, labels: np.ndarray, view: DefenderView, key: Key) -> tuple[np.ndarray, ...]:
    """Masks [K, H, W, 1], patterns [K, H, W, C] and areas [K]: an empty mask, but the largest area, if none works."""
    model, number = victim.model, len(labels)
    size = batch_of(_PATCH_BATCH, len(view.labels))
    state: Any = {
        "moved": {"mask": jnp.zeros((number, *model.shape[:2], 1)), "pattern": jnp.zeros((number, *model.shape))},
        "cost": jnp.full(number, 0.1), "rate": jnp.zeros(number), "smallest": jnp.full(number, jnp.inf),
        "best": {"mask": jnp.zeros((number, *model.shape[:2], 1)), "pattern": jnp.full((number, *model.shape), 0.5)},
    }  # fmt: skip
    state["opt"] = _ADAM.init(state["moved"])
    shared = {
        "images": jnp.asarray(view.images), "labels": jnp.asarray(view.labels), "goals": jnp.asarray(labels),
        "variables": dict(victim.variables),
    }  # fmt: skip
    index = jnp.asarray(batches(key, len(view.labels), size, _PATCH_STEPS))
    tick = partial(view.watch.tick, "smallest patch of the suspicious classes")
    state = run_epoch(_patch_step(model), state, {"index": index}, {}, shared, tick=tick)[0]
    areas = np.minimum(np.asarray(state["smallest"]), np.prod(model.shape[:2]))
    return np.asarray(state["best"]["mask"]), np.asarray(state["best"]["pattern"]), areas


_ADAM = optax.scale_by_adam(0.5, 0.9)


@lru_cache(maxsize=16)
def _patch_step(model: Model) -> Callable:
    """One step of all masks and patterns, in the engine's form; the cost of a mask grows while it works."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        goals = shared["goals"]

        def loss(moved: Any) -> tuple[jax.Array, jax.Array]:
            mask, pattern = jax.nn.sigmoid(moved["mask"])[:, None], jax.nn.sigmoid(moved["pattern"])[:, None]
            stamped = (1 - mask) * images[None] + mask * pattern
            value, hits = hinge(model, shared["variables"], stamped, labels, goals)
            spread = (state["cost"] * mask.sum((1, 2, 3, 4))).sum() / parallel.size(axis)
            return value + spread, hits

        number = counted(labels, goals).sum(1)
        (_, hits), gradient = jax.value_and_grad(loss, has_aux=True)(state["moved"])
        hits, gradient, number = parallel.total((hits, gradient, number), axis)
        rate = 0.7 * state["rate"] + 0.3 * hits / jnp.maximum(number, 1)
        mask = jax.nn.sigmoid(state["moved"]["mask"])
        size = mask.sum((1, 2, 3))
        better = (rate >= _WORKS) & (size < state["smallest"])
        here = {"mask": mask, "pattern": jax.nn.sigmoid(state["moved"]["pattern"])}
        best = jax.tree.map(lambda new, old: jnp.where(better[:, None, None, None], new, old), here, state["best"])
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _ADAM.update(gradient, state["opt"])
        moved = jax.tree.map(lambda p, u: p - _PATCH_RATE * u, state["moved"], update)
        cost = state["cost"] * jnp.where(rate >= _WORKS, 1.1, 1 / 1.1**1.5)
        smallest = jnp.where(better, size, state["smallest"])
        return {"moved": moved, "opt": opt, "cost": cost, "rate": rate, "best": best, "smallest": smallest}, {}

    return step
