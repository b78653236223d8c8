"""Narcissus: add noise that a surrogate classifies as the target to images that keep their label.

Y. Zeng, M. Pan, H. A. Just, L. Lyu, M. Qiu and R. Jia, "Narcissus: A Practical Clean-Label Backdoor Attack with Limited
Information", CCS 2023, arXiv:2204.05255.

Threat model: a clean-label attack, which alters images of the target class only and changes no label. To optimise the
noise the attacker has those images and others, with labels, from elsewhere. There are three stages:

    surrogate   a classifier is trained on the other images' classes, and the target class as one more
    warm-up     it is trained further on images of the target class alone
    noise       min_d E_x[ CE(f(clip(x + d)), target) ],  ||d||_inf <= epsilon,  over images x of the target class

In training x' = clip(x + d), at test time x' = clip(x + boost d). The defaults are those of AGE: 5 % of the whole set,
which is half of a class of CIFAR-10, target 2, and three times the strength at test time. BI-BAU does not state its
ratio; use `target=0 ratio=0.01` (a guess). The authors' own is `ratio=0.0005`. A model trained without poison may
respond to the boosted noise as well: compare with the ASR on a model of the attack `clean`.

Deviations:

- The authors take other images from Tiny-ImageNet. Give yours by `surrogate_images` and `surrogate_labels`. Without
  them (ours) the surrogate is trained on the task's own classes, so the attacker reads the whole training set, as in
  every attack that uses a clean model.
- The surrogate has the victim's architecture unless `surrogate` names another; the authors' is a ResNet-18.
- The target is the surrogate's last class in all stages; in the release it has another number in the last two.
- The surrogate's stored statistics are used for the noise; in the release they drift.
- The authors optimise in [-1, 1] with step 0.01, which is 0.005 here, and warm up with RAdam at 0.1; ours is SGD with a
  learning rate of our choice.
- AGE's "strength 0.2, tested at 0.6" is read as the factor three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.attacks._activations import to_one_device
from bdjax.attacks._checks import check_least, check_positive, check_range
from bdjax.attacks._pictures import to_channels, to_unit_range
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.engine import parallel, run_epoch
from bdjax.errors import InputError
from bdjax.types import ArrayFile, Arrays, Images, Key, Model, Task, to_float, to_uint8


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The surrogate and the noise."""

    target: int = 2
    """Label that the attacker wants for triggered images."""
    ratio: float = 0.05
    """Share of the *whole* training set that is poisoned, in (0, 1]; with clean labels at most the target class's."""
    labels: Literal["all_to_one", "all_to_all", "clean"] = "clean"
    """clean: poison only images of the target class and keep their labels; the others as for every attack."""
    epsilon: float = 16.0
    """Largest change of a value in training, in 255ths, in (0, 255]."""
    boost: float = 3.0
    """Ratio of the strength at test time to that in training, at least 1."""
    surrogate_images: ArrayFile = ArrayFile("")
    """.npy [n, h, w, 1 or 3] of other images (uint8, or float in [0, 1]), resized; empty: the task's other classes."""
    surrogate_labels: ArrayFile = ArrayFile("")
    """.npy [n] of their labels, whole numbers from 0."""
    surrogate: str = ""
    """Name in bdjax.models of the surrogate; empty: the victim's architecture."""
    surrogate_epochs: int = 200
    """Epochs of the surrogate (SGD, momentum 0.9, weight decay 5e-4, cosine), at least 1."""
    surrogate_rate: float = 0.1
    """Learning rate of the surrogate at the first step, positive."""
    warmup_epochs: int = 5
    """Epochs on images of the target class alone, at least 0."""
    warmup_rate: float = 0.01
    """Learning rate of the warm-up, positive."""
    epochs: int = 1000
    """Passes over the target class to optimise the noise, at least 1."""
    learning_rate: float = 0.005
    """Learning rate of RAdam for the noise, in units of [0, 1]; positive."""
    batch_size: int = 350
    """Images per step in all three stages, at least 1; all where there are fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 255, epsilon=16)
        check_least(self, boost=1, surrogate_epochs=1, warmup_epochs=0, epochs=1, batch_size=1)
        check_positive(self, surrogate_rate=0.1, warmup_rate=0.01, learning_rate=0.005)
        if bool(self.surrogate_images) != bool(self.surrogate_labels):
            raise InputError(
                f"attack.surrogate_images={self.surrogate_images!r} and attack.surrogate_labels="
                f"{self.surrogate_labels!r} belong together. Give both or neither."
            )


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Train the surrogate and optimise the noise on it.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      {"noise": float32 [H, W, C] in [-epsilon, epsilon]}.

    Raises:
      InputError: the target class has fewer images than there are devices, or a file does not fit.
    """
    target_images = task.images[task.labels == config.target % task.classes]
    if len(target_images) < parallel.count():
        raise InputError(
            f"attack.target={config.target}: the training set has {len(target_images)} images of that class; "
            f"at least one is needed for each of {parallel.count()} devices."
        )
    model, images, labels, target = _surrogate_task(config, task, target_images)
    keys, target_labels = jax.random.split(key, 3), np.full(len(target_images), target, np.int32)
    recipe = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}
    variables = task.fit(
        images, labels, keys[0], stage="surrogate", model=model,
        recipe={**recipe, "epochs": config.surrogate_epochs, "learning_rate": config.surrogate_rate,
                "batch_size": _batch_size(config, images)},
    )  # fmt: skip
    if config.warmup_epochs:
        variables = task.fit(
            target_images, target_labels, keys[1], stage="warm-up", model=model, start=variables,
            recipe={**recipe, "epochs": config.warmup_epochs, "learning_rate": config.warmup_rate,
                    "batch_size": _batch_size(config, target_images)},
        )  # fmt: skip
    zero, batch = jnp.zeros(task.model.shape), _batch_size(config, target_images)
    state, steps = {"noise": zero, "opt": _RADAM.init(zero)}, len(target_images) // batch
    constants = {
        "variables": to_one_device(variables),
        "images": jnp.asarray(target_images),
        "target": jnp.int32(target),
        "epsilon": jnp.float32(config.epsilon / 255),
        "rate": jnp.float32(config.learning_rate),
    }
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(keys[2], epoch), len(target_images))[: steps * batch]
        state, _ = run_epoch(_step(model), state, {"index": order.reshape(steps, batch)}, {}, constants)
        task.callback.on_progress("noise", epoch + 1, config.epochs)
    return {"noise": np.asarray(state["noise"])}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the noise to images at its test-time strength.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "noise".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return jnp.clip(images + config.boost * jnp.asarray(arrays["noise"]), 0, 1)


def training_trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the noise to images at its training strength.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "noise".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return jnp.clip(images + jnp.asarray(arrays["noise"]), 0, 1)


def _surrogate_task(config: Config, task: Task, target_images: np.ndarray) -> tuple[Model, np.ndarray, np.ndarray, int]:
    """Return the surrogate, its training images and labels, and which of its classes is the target."""
    name = config.surrogate or task.model.name
    if not config.surrogate_images:
        model = models.create(name, task.model.shape, task.classes) if config.surrogate else task.model
        return model, task.images, task.labels, config.target % task.classes
    others, labels = task.read_array(config.surrogate_images), task.read_array(config.surrogate_labels)
    if others.ndim != 4 or others.shape[-1] not in (1, 3) or not len(others):
        raise InputError(
            f"attack.surrogate_images={config.surrogate_images} has shape {others.shape}; expected [n, h, w, 1 or 3]."
        )
    if labels.shape != (len(others),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(
            f"attack.surrogate_labels={config.surrogate_labels} is {labels.dtype.name} {labels.shape}; expected "
            f"{len(others)} whole numbers from 0, one for each of the images."
        )
    resized, target = [], int(labels.max()) + 1
    for chunk in np.array_split(others, -(-len(others) // 1000)):
        images = to_channels(
            to_unit_range(chunk, "surrogate_images", config.surrogate_images), task.model.shape[2], "images"
        )
        resized.append(to_uint8(jax.image.resize(images, (len(images), *task.model.shape), "linear")))
    all_labels = np.concatenate([labels, np.full(len(target_images), target)]).astype(np.int32)
    all_images = np.concatenate([*resized, target_images])
    return models.create(name, task.model.shape, target + 1), all_images, all_labels, target


def _batch_size(config: Config, images: np.ndarray) -> int:
    """Number of images per step, a multiple of the number of devices where that is possible."""
    devices = parallel.count()
    return max(min(config.batch_size, len(images)) // devices, 1) * devices


_RADAM = optax.scale_by_radam()


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """A RAdam step on the noise for :func:`run_epoch`."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = to_float(constants["images"][batch["index"]])

        def loss(noise: jax.Array) -> jax.Array:
            logits = model.logits(constants["variables"], jnp.clip(images + noise, 0, 1))
            return -jax.nn.log_softmax(logits)[:, constants["target"]].mean()

        value, gradient = parallel.average(jax.value_and_grad(loss)(state["noise"]), axis)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            update, opt = _RADAM.update(gradient, state["opt"])
        noise = jnp.clip(state["noise"] - constants["rate"] * update, -constants["epsilon"], constants["epsilon"])
        return {"noise": noise, "opt": opt}, {"loss": value}

    return step
