"""Synthetic: detect a backdoor without any data, by the smallest patches on images that are made from the model.

Ours; the statistic is that of Neural Cleanse (B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE Symposium on Security and Privacy 2019), the images are dead leaves
(:mod:`bdjax.detectors._dead_leaves`).

Threat model: the auditor has the model alone: no image and no trigger.

For each class, images are made that the model itself takes for this class with certainty: random images (dead leaves)
ascend the margin of the class until it is `margin`. They stand in for clean images. A backdoor's trigger sends them to
the target class, too, so that the smallest patch to each class is searched on them
(:mod:`bdjax.defenses._patches`). The statistic of a class is −log of the patch's area, and its p-value compares the
class with the others (:func:`bdjax.metrics.outlier_p_values`).
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses import _patches
from bdjax.detectors._dead_leaves import dead_leaves
from bdjax.detectors._evidence import FREEDOM_WITHOUT_IMAGES, LARGEST_LEVEL, scores_of
from bdjax.engine import parallel, predict, run_epoch
from bdjax.errors import check_fields
from bdjax.metrics import Prior
from bdjax.types import DefenderView, Key, Model, Scores, Victim, to_uint8

NEEDS_IMAGES = False


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the images, the search and the decision."""

    images: int = 120
    """Images, at least one per class."""
    image_steps: int = 40
    """Steps in which the images are made."""
    image_rate: float = 0.02
    """Step size of the images under Adam, in pixel values of [0, 1]; positive."""
    margin: float = 6.0
    """Margin of an image's class, in logits, above which it does not change any more; positive."""
    steps: int = 160
    """Steps of the search for patches; each has 24 images per class, with more than ten classes fewer, at least 5."""
    deviation: float = 0.3
    """Typical standard deviation of the logarithm of the areas between the classes of a clean model, the prior of the
    measured one; positive. Chosen on 39 clean models (experiments/results/audit)."""
    level: float = 0.05
    """The model is judged to be backdoored when its p-value is at most this, in (0, 0.3]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("images", "image_steps", "steps"), "at least 1", lambda v: v >= 1),
            (("image_rate", "margin", "deviation"), "positive", lambda v: v > 0),
            (("level",), f"in (0, {LARGEST_LEVEL}]", lambda v: 0 < v <= LARGEST_LEVEL),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Compare the areas of the smallest patches of the classes on images that are made from the model.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: its images are not used. Its callback receives the patches of the three most suspicious classes.
      key: draws the first images and the batches.

    Returns:
      For each class −log of the area of its patch relative to the median, with the p-value of the model.
    """
    model, variables, goals = victim.model, victim.variables, np.arange(victim.model.classes, dtype=np.int32)
    images, labels = class_images(config, victim, view, jax.random.fold_in(key, 0))
    patches = _patches.search(
        model, variables, images, labels, goals, config.steps, jax.random.fold_in(key, 1),
        tick=partial(view.callback.on_progress, "smallest patch of synthetic images"),
    )  # fmt: skip
    nearest = np.argsort(patches.areas, kind="stable")[:3]
    view.callback.on_round_end(
        0,
        variables,
        recovered=np.asarray(patches.masks * patches.patterns)[nearest],
        recovered_labels=nearest,
    )
    statistics = -np.log(np.maximum(patches.areas, 0.3))
    return scores_of(statistics, config.level, Prior(config.deviation, FREEDOM_WITHOUT_IMAGES))


def class_images(
    config: Config, victim: Victim, view: DefenderView, key: Key
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Make images that the model assigns to each class in turn.

    Args:
      config: the hyper-parameters.
      victim: the model.
      view: its callback receives the progress.
      key: draws the random images at the start.

    Returns:
      Images, uint8 [N, H, W, C], and the model's predictions for them, int32 [N].
    """
    model, devices = victim.model, parallel.count()
    count = -(-max(config.images, model.classes) // devices) * devices
    state: Any = {"images": dead_leaves(key, count, model.shape)}
    state["opt"] = _ADAM.init(state["images"])
    constants = {
        "variables": dict(victim.variables), "goals": jnp.arange(count, dtype=jnp.int32) % model.classes,
        "rate": jnp.float32(config.image_rate), "margin": jnp.float32(config.margin),
    }  # fmt: skip
    batches = {"step": jnp.zeros((config.image_steps, devices))}  # nothing but the number of steps
    tick = partial(view.callback.on_progress, "images of every class")
    state = run_epoch(_step(model), state, batches, {}, constants, tick=tick)[0]
    images = to_uint8(state["images"])
    return images, predict(model, victim.variables, images)


_ADAM = optax.scale_by_adam()


@lru_cache(maxsize=16)
def _step(model: Model) -> Any:
    """Return one step of all images, in the engine's form; every device takes the same step."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        is_goal = jax.nn.one_hot(constants["goals"], model.classes, dtype=bool)

        def loss(images: jax.Array) -> jax.Array:
            logits = model.logits(constants["variables"], images)
            goal, others = jnp.where(is_goal, logits, -jnp.inf).max(-1), jnp.where(is_goal, -jnp.inf, logits).max(-1)
            return jnp.maximum(0, others - goal + constants["margin"]).sum()

        gradient = jax.grad(loss)(state["images"])
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _ADAM.update(gradient, state["opt"])
        images = jnp.clip(state["images"] - constants["rate"] * update, 0, 1)
        return {"images": images, "opt": opt}, {}

    return step
