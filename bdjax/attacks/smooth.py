"""Smooth: add one low-frequency universal perturbation that sends a clean model's predictions to the target.

Y. Zeng, W. Park, Z. M. Mao and R. Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
arXiv:2104.03413.

Threat model: the attacker writes a share of the training set and has a model trained on the clean one. Starting with
v = 0, for images x of other classes in turn, as long as f(x + v) = f(x):

    D = targeted DeepFool from clip(x + v),    v <- g(v + g(D)),    v <- peak (v - min v) / (max v - min v)

until, after a pass, the share `fooled` of the images has another label than before; x' = clip(x + v, 0, 1). g is a
Gaussian low-pass filter along rows and columns with zeros outside the image, so v fades towards the edges. A DeepFool
step goes to the point where, in a linear model, the target's logit equals the largest one, and `overshoot` further. The
defaults are I-BAU's: values in [0, 0.2], target 6, 20 % of the images.

Deviations:

- The number of passes over the images is bounded.
- After every pass the release sets the target to the label that most images are sent to (6 on CIFAR-10); ours stays the
  Config's.
- The release's filter has 30 taps; ours is symmetric with 31 (of 32 pixels).
- The release also has a variant that rescales every triggered image to [0, 1]; I-BAU does not use it, nor do we. I-BAU
  does not round poisoned images: `quantise=False`.
- None of the 100 images is of the target class.
- DeepFool's linear model contains, at each step, the target's logit and the largest one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks._activations import to_one_device
from bdjax.attacks._checks import check_least, check_positive, check_range
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Model, Task, Variables, to_float


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The perturbation and its optimisation."""

    target: int = 6
    """Label that the attacker wants for triggered images."""
    ratio: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    peak: float = 0.2
    """Largest value of the perturbation, whose smallest is 0; in (0, 1]."""
    sigma: float = 6.0
    """Standard deviation of the low-pass filter, in pixels of a 32x32 image, positive."""
    images: int = 100
    """Number of training images to optimise on, at least 1; all if there are fewer."""
    fooled: float = 0.2
    """Share of them whose label must change for the passes to end, in (0, 1]."""
    epochs: int = 5
    """Largest number of passes over the images, at least 1."""
    deepfool_steps: int = 200
    """Largest number of DeepFool steps for an image, at least 1; images that do not reach the target are skipped."""
    overshoot: float = 0.02
    """Distance that DeepFool goes beyond the boundary, as a share of the distance to it, at least 0."""

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
      InputError: all training images are of the target class, or DeepFool reaches it from no image.
    """
    model, variables, target = task.model, to_one_device(task.clean()), config.target % task.classes
    pool = np.flatnonzero(task.labels != target)
    if not len(pool):
        raise InputError(f"attack.target={config.target}, but all training images are of that class.")
    chosen = jax.random.permutation(key, len(pool))[: config.images]
    images = np.asarray(to_float(task.images[pool[np.asarray(chosen)]]))
    down, across = (_low_pass(side, config.sigma * side / 32) for side in model.shape[:2])
    predict = _predict(model)
    before = np.asarray(predict(variables, images))
    v: np.ndarray = np.zeros(model.shape, np.float32)
    for epoch in range(config.epochs):
        for index, (image, label) in enumerate(zip(images, before, strict=True)):
            change = _deepfool(config, model, variables, np.clip(image + v, 0, 1), int(label), target)
            if change is not None:
                v = _filter(down, across, v + _filter(down, across, change))
                v = config.peak * (v - v.min()) / (v.max() - v.min())
            task.callback.on_progress(
                "smooth perturbation", epoch * len(images) + index + 1, config.epochs * len(images)
            )
        if (np.asarray(predict(variables, np.clip(images + v, 0, 1))) != before).mean() >= config.fooled:
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
    """Return a Gaussian filter with zeros outside the image, cut off at 15/32 of the side: float32 [side, side]."""
    distance = np.arange(side)[:, None] - np.arange(side)
    kernel = np.where(np.abs(distance) <= 15 * side // 32, np.exp(-((distance / sigma) ** 2) / 2), 0)
    reach = np.arange(-(15 * side // 32), 15 * side // 32 + 1)
    return (kernel / np.exp(-((reach / sigma) ** 2) / 2).sum()).astype(np.float32)


def _filter(down: np.ndarray, across: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Filter a picture [H, W, C] along its columns and rows."""
    return np.einsum("ih,jw,hwc->ijc", down, across, picture, optimize=True)


def _deepfool(
    config: Config, model: Model, variables: Variables, image: np.ndarray, label: int, target: int
) -> np.ndarray | None:
    """Return the change that sends an image [H, W, C] to the target.

    None when the image is not classified as `label`, or does not reach the target within the steps.
    """
    step, change = _step(model), np.zeros_like(image)
    for index in range(config.deepfool_steps + 1):
        point = image + np.float32(1 + config.overshoot) * change
        prediction, update = step(variables, point, target)
        if index == 0 and int(prediction) != label:
            return None
        if int(prediction) == target:
            return point - image if index else None
        change = change + np.asarray(update)
    return None


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """Compile a DeepFool step: (variables, image, target) -> (prediction, update of the image)."""

    def run(variables: Variables, image: jax.Array, target: int) -> tuple[jax.Array, jax.Array]:
        def gap(image: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.logits(variables, image[None])[0]
            return logits.max() - logits[target], logits.argmax()

        (difference, prediction), gradient = jax.value_and_grad(gap, has_aux=True)(image)
        norm = jnp.maximum(jnp.linalg.norm(gradient), 1e-12)
        return prediction, -(difference / norm + 1e-4) * gradient / norm

    return jax.jit(run)


@lru_cache(maxsize=16)
def _predict(model: Model) -> Callable:
    """Compile the predicted labels: (variables, images) -> int32 [N]."""
    return jax.jit(lambda variables, images: model.logits(variables, images).argmax(-1))
