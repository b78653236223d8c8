"""Smooth: one low-frequency perturbation, added to every image, that leads a clean model to the target (Zeng et al.,
ICCV 2021, arXiv:2104.03413).

Threat model: the attacker writes a share of the training set and has a model trained on the clean one. Beginning with
v = 0, for images x of other classes in turn, where f(x) = f(x + v) still:

    D = targeted DeepFool from clip(x + v),    v <- g(v + g(D)),    v <- peak (v - min v) / (max v - min v)

until a pass leaves the share `fooled` of the images with another label than before; x' = clip(x + v, 0, 1). g is
a Gaussian low-pass filter along rows and columns with zeros outside the image, so v fades at the edges. A DeepFool
step goes to where the target's logit reaches the largest one on a linear model, and `overshoot` further. The defaults
are I-BAU's: values in [0, 0.2], target 6, 20 % of the images.

Deviations: the passes over the images are bounded. The release sets the target anew after every pass to the label
that most images go to (how CIFAR-10 came to 6); ours stays the Config's. Its filter has 30 taps, ours is symmetric
with 31 (of 32 pixels). It also shows a form that rescales every stamped image to [0, 1], which I-BAU does not; neither
do we, and I-BAU does not round: `quantise=False`. The 100 images are none of the target class. DeepFool's linear
model is of the target's logit and the largest one at each step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks._checks import check_least, check_positive, check_range
from bdjax.attacks._helpers import PoisonConfig
from bdjax.attacks._optimise import to_one_device
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Model, Task, Variables, to_float


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The perturbation and how it is found."""

    target: int = 6
    """Label that a triggered image shall get."""
    ratio: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    peak: float = 0.2
    """Largest value of the perturbation, whose smallest is 0; in (0, 1]."""
    sigma: float = 6.0
    """Standard deviation of the low-pass filter, in pixels of a 32x32 image, positive."""
    images: int = 100
    """Training images that it is made on, at least 1; fewer if there are not as many."""
    fooled: float = 0.2
    """Share of them whose label must change for the passes to end, in (0, 1]."""
    epochs: int = 5
    """Passes over the images at most, at least 1."""
    deepfool_steps: int = 200
    """Steps of DeepFool for an image at most, at least 1; one that does not arrive is left out."""
    overshoot: float = 0.02
    """How much further than the boundary DeepFool goes, as a share of the way, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, peak=0.2, fooled=0.2)
        check_least(self, images=1, epochs=1, deepfool_steps=1, overshoot=0)
        check_positive(self, sigma=6)


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Optimise a smooth universal perturbation on a clean model.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      {"pattern": float32 [H, W, C] in [0, peak]}.

    Raises:
      InputError: all training images are of the target class, or DeepFool reaches it from none of them.
    """
    model, variables, target = task.model, to_one_device(task.clean()), config.target % task.classes
    pool = np.flatnonzero(task.labels != target)
    if not len(pool):
        raise InputError(f"attack.target={config.target}, but all training images are of that class.")
    chosen = jax.random.permutation(key, len(pool))[: config.images]
    images = np.asarray(to_float(task.images[pool[np.asarray(chosen)]]))
    down, across = (_low_pass(side, config.sigma * side / 32) for side in model.shape[:2])
    seen = _labels(model)
    before = np.asarray(seen(variables, images))
    v: np.ndarray = np.zeros(model.shape, np.float32)
    for epoch in range(config.epochs):
        for index, (image, label) in enumerate(zip(images, before, strict=True)):
            found = _deepfool(config, model, variables, np.clip(image + v, 0, 1), int(label), target)
            if found is not None:
                v = _filtered(down, across, v + _filtered(down, across, found))
                v = config.peak * (v - v.min()) / (v.max() - v.min())
            task.callback.on_progress(
                "smooth perturbation", epoch * len(images) + index + 1, config.epochs * len(images)
            )
        if (np.asarray(seen(variables, np.clip(images + v, 0, 1))) != before).mean() >= config.fooled:
            break
    if not v.any():
        raise InputError(
            f"DeepFool leads the clean model from none of {len(images)} images to class {target} within "
            f"attack.deepfool_steps={config.deepfool_steps}. Use more, or train the model longer (--fit.epochs)."
        )
    return {"pattern": v}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the perturbation to images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "pattern".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return jnp.clip(images + jnp.asarray(arrays["pattern"]), 0, 1)


def _low_pass(side: int, sigma: float) -> np.ndarray:
    """The matrix [side, side] of a Gaussian filter with zeros outside, cut off at 15/32 of the side, float32."""
    far = np.arange(side)[:, None] - np.arange(side)
    kernel = np.where(np.abs(far) <= 15 * side // 32, np.exp(-((far / sigma) ** 2) / 2), 0)
    reach = np.arange(-(15 * side // 32), 15 * side // 32 + 1)
    return (kernel / np.exp(-((reach / sigma) ** 2) / 2).sum()).astype(np.float32)


def _filtered(down: np.ndarray, across: np.ndarray, picture: np.ndarray) -> np.ndarray:
    return np.einsum("ih,jw,hwc->ijc", down, across, picture, optimize=True)


def _deepfool(
    config: Config, model: Model, variables: Variables, image: np.ndarray, label: int, target: int
) -> np.ndarray | None:
    """What leads an image [H, W, C] to the target; None when it is not called `label` any more, or does not arrive."""
    step, moved = _step(model), np.zeros_like(image)
    for index in range(config.deepfool_steps + 1):
        at = image + np.float32(1 + config.overshoot) * moved
        seen, further = step(variables, at, target)
        if index == 0 and int(seen) != label:
            return None
        if int(seen) == target:
            return at - image if index else None
        moved = moved + np.asarray(further)
    return None


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    def run(variables: Variables, image: jax.Array, target: int) -> tuple[jax.Array, jax.Array]:
        def gap(image: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.logits(variables, image[None])[0]
            return logits.max() - logits[target], logits.argmax()

        (behind, seen), slope = jax.value_and_grad(gap, has_aux=True)(image)
        steep = jnp.maximum(jnp.linalg.norm(slope), 1e-12)
        return seen, -(behind / steep + 1e-4) * slope / steep

    return jax.jit(run)


@lru_cache(maxsize=16)
def _labels(model: Model) -> Callable:
    return jax.jit(lambda variables, images: model.logits(variables, images).argmax(-1))
