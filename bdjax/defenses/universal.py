"""Universal perturbation: how little must be added to all images alike until they are taken for one class.

Threat model: the auditor has the model and clean labelled images, no trigger. It audits; it repairs nothing.

The inner problem of I-BAU (Zeng et al., ICLR 2022, Eq. 3) asks for one perturbation of all images,

    δ = argmax_{‖δ‖ <= C} mean CE(f(x + δ), y)

A trigger is a solution whose images all end in one class. So δ is found by projected ascent and then shrunk: its class
t is the one that most images, not of t before, are taken for at clip(x + δ, 0, 1); the *norm* is the smallest length of
s δ, 0 < s <= 1, at which at least `enough` of those images are taken for t. Lengths are in units of D, the median over
the clean images of the L2 distance to the nearest one of another class: what it takes anyhow to change an image's
class. A backdoor takes less.

The paper uses δ to unlearn, not to accuse; C in units of D, the shrinking and the verdict are ours.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._universal import universal
from bdjax.engine import parallel, predict
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Scores, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The ascent and the verdict."""

    radius: float = 1.0
    """C in units of D; positive."""
    step: float = 0.1
    """Length of a step of δ in units of C; positive."""
    batch_size: int = 100
    """Images a step, at most."""
    passes: int = 5
    """Passes over the images."""
    scales: int = 50
    """Lengths of δ that are tried."""
    enough: float = 0.5
    """Share of the images of other classes that must be taken for one class, in (0, 1]."""
    threshold: float = 0.5
    """A smaller norm, in units of D, is a backdoor's; positive."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("batch_size", "passes", "scales"), "at least 1", lambda v: v >= 1),
            (("radius", "step", "threshold"), "positive", lambda v: v > 0),
            (("enough",), "in (0, 1]", lambda v: 0 < v <= 1),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Towards which class one perturbation turns the images, and whether too little of it is enough.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: shuffles them.
    Returns: per class the share of images, not taken for it before, that δ sends there; the watch is shown δ
      (float32 [1, H, W, C], at the norm found), and the norm in units of D (inf where nothing is enough).
    Raises InputError for images of one class alone.
    """
    model, total = victim.model, len(view.labels)
    size = max(1, min(config.batch_size, total) // parallel.count()) * parallel.count()
    number = total // size
    images = np.asarray(to_float(view.images))
    distance = _distance(images, np.asarray(view.labels))
    bound = config.radius * distance
    orders = [
        jax.random.permutation(k, total)[: number * size].reshape(number, size)
        for k in jax.random.split(key, config.passes)
    ]
    shared = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        **{name: victim.variables[name] for name in ("params", "batch_stats")},
        "hyper": {"norm_bound": jnp.float32(bound), "step": jnp.float32(config.step * bound)},
    }
    tick = partial(view.callback.on_progress, "universal perturbation")
    delta = np.asarray(universal(model, shared, jnp.concatenate(orders), tick))
    before = np.asarray(predict(model, victim.variables, view.images))

    def rates(scale: float) -> np.ndarray:
        after = np.asarray(predict(model, victim.variables, np.clip(images + np.float32(scale) * delta, 0, 1)))
        found = [(after[before != t] == t).mean() if (before != t).any() else np.nan for t in range(model.classes)]
        return np.array(found, np.float32)

    classes = rates(1.0)
    target, length = int(np.nanargmax(classes)), float(np.linalg.norm(delta))
    fits = (s for s in np.arange(1, config.scales + 1) / config.scales if rates(s)[target] >= config.enough)
    scale = next(fits, np.inf)
    norm = scale * length / distance
    view.callback.on_round_end(
        0, victim.variables, perturbation=delta * np.float32(min(scale, 1.0)), norm=np.float32(norm)
    )
    return Scores(classes, target, float(classes[target]), bool(norm < config.threshold))


def _distance(images: np.ndarray, labels: np.ndarray) -> float:
    """D: the median over images of the L2 distance to the nearest one of another class."""
    if len(np.unique(labels)) < 2:
        raise InputError("universal needs clean images of two classes or more. Use a larger --split.size.")
    flat = images.reshape(len(images), -1).astype(np.float64)
    squares = (flat**2).sum(1)
    nearest = []
    for begin in range(0, len(flat), 1000):  # a block of the matrix of distances at a time
        part = slice(begin, begin + 1000)
        block = squares[part, None] + squares[None] - 2 * flat[part] @ flat.T
        block[labels[part, None] == labels[None]] = np.inf
        nearest.append(block.min(1))
    return float(np.median(np.sqrt(np.maximum(np.concatenate(nearest), 0))))
