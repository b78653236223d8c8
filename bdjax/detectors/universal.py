"""Universal perturbation: detect a backdoor by the norm of one perturbation that sends most images to a single class.

A use of the inner problem of I-BAU: Y. Zeng, S. Chen, W. Park, Z. M. Mao, M. Jin and R. Jia, "Adversarial Unlearning of
Backdoors via Implicit Hypergradient", ICLR 2022, arXiv:2110.03735, Eq. 3.

Threat model: the auditor has the model and clean labelled images, but no trigger. The method detects and does not
repair.

The inner problem maximises the loss over one perturbation that is added to all images,

    δ = argmax_{‖δ‖ <= C} mean CE(f(x + δ), y)

A trigger is a solution for which all images are assigned to one class. Therefore δ is found by projected gradient
ascent and then scaled down. Its class t is the one to which clip(x + δ, 0, 1) moves the largest share of the images
that were not assigned to t before. The *norm* is the smallest length of s δ, 0 < s <= 1, at which at least a fraction
`enough` of those images is assigned to t. Lengths are in units of D, the median over the clean images of the L2
distance to the nearest image of another class, which is the change that alters an image's class anyway. A backdoor
needs less.

Deviations:

- The paper uses δ to unlearn, not to detect: C in units of D, the scaling down and the decision rule are ours.
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

ON_REQUEST = True


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the gradient ascent and of the decision."""

    radius: float = 1.0
    """C, the bound of ‖δ‖, in units of D; positive."""
    step: float = 0.1
    """Length of one ascent step in units of C; positive."""
    batch_size: int = 100
    """Images per step, at most."""
    passes: int = 5
    """Passes over the images."""
    scales: int = 50
    """Number of lengths of δ that are tried."""
    enough: float = 0.5
    """Fraction of the images of other classes that must be assigned to one class, in (0, 1]."""
    threshold: float = 0.5
    """Norm, in units of D, below which the model is judged to be backdoored; positive."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("batch_size", "passes", "scales"), "at least 1", lambda v: v >= 1),
            (("radius", "step", "threshold"), "positive", lambda v: v > 0),
            (("enough",), "in (0, 1]", lambda v: 0 < v <= 1),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Find the class to which one universal perturbation moves the images, and the norm that this takes.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives δ, float32 [1, H, W, C], scaled to
        the norm found, and that norm in units of D (inf when no length is enough).
      key: shuffles the images.

    Returns:
      For each class the fraction of the images, not assigned to it before, that δ moves there; the model is judged to
      be backdoored when the norm is below `config.threshold`.

    Raises:
      InputError: when all images belong to one class.
    """
    model, total = victim.model, len(view.labels)
    batch_size = max(1, min(config.batch_size, total) // parallel.count()) * parallel.count()
    steps = total // batch_size
    images = np.asarray(to_float(view.images))
    distance = _distance(images, np.asarray(view.labels))
    bound = config.radius * distance
    passes = [
        jax.random.permutation(k, total)[: steps * batch_size].reshape(steps, batch_size)
        for k in jax.random.split(key, config.passes)
    ]
    constants = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        **{name: victim.variables[name] for name in ("params", "batch_stats")},
        "hyper": {"norm_bound": jnp.float32(bound), "step": jnp.float32(config.step * bound)},
    }
    tick = partial(view.callback.on_progress, "universal perturbation")
    delta = np.asarray(universal(model, constants, jnp.concatenate(passes), tick))
    predictions = np.asarray(predict(model, victim.variables, view.images))

    def success_rates(scale: float) -> np.ndarray:
        after = np.asarray(predict(model, victim.variables, np.clip(images + np.float32(scale) * delta, 0, 1)))
        class_rates = [
            (after[predictions != t] == t).mean() if (predictions != t).any() else np.nan for t in range(model.classes)
        ]
        return np.array(class_rates, np.float32)

    rates_at_bound = success_rates(1.0)
    target, length = int(np.nanargmax(rates_at_bound)), float(np.linalg.norm(delta))
    sufficient = (
        s for s in np.arange(1, config.scales + 1) / config.scales if success_rates(s)[target] >= config.enough
    )
    scale = next(sufficient, np.inf)
    norm = scale * length / distance
    view.callback.on_round_end(
        0, victim.variables, perturbation=delta * np.float32(min(scale, 1.0)), norm=np.float32(norm)
    )
    return Scores(rates_at_bound, target, float(rates_at_bound[target]), bool(norm < config.threshold))


def _distance(images: np.ndarray, labels: np.ndarray) -> float:
    """Return D: the median over images of the L2 distance to the nearest image of another class."""
    if len(np.unique(labels)) < 2:
        raise InputError("universal needs clean images of two classes or more. Use a larger --split.size.")
    vectors = images.reshape(len(images), -1).astype(np.float64)
    squares = (vectors**2).sum(1)
    nearest = []
    for start in range(0, len(vectors), 1000):  # a block of the matrix of distances at a time
        rows = slice(start, start + 1000)
        block_distances = squares[rows, None] + squares[None] - 2 * vectors[rows] @ vectors.T
        block_distances[labels[rows, None] == labels[None]] = np.inf
        nearest.append(block_distances.min(1))
    return float(np.median(np.sqrt(np.maximum(np.concatenate(nearest), 0))))
