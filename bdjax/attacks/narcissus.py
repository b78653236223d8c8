"""Narcissus: noise that says "target class" to a surrogate, added to images that keep their label (Zeng et al., CCS
2023, arXiv:2204.05255).

Threat model: the attacker alters images of the target class only and labels nothing wrongly; to make the noise it has
those images and others, with labels, from elsewhere. Three stages:

    surrogate   a classifier learns the other images' classes, and the target class as one more
    warm-up     it goes on with images of the target class alone
    noise       min_d E_x[ CE(f(clip(x + d)), target) ],  ||d||_inf <= epsilon,  over images x of the target class

In training x' = clip(x + d), at test time x' = clip(x + boost d). The defaults are those of AGE: 5 % of the whole
set, half of a class of CIFAR-10, target 2, the test three times as strong. BI-BAU does not say its ratio; for it take
`target=0 ratio=0.01` (a guess) and the authors' own is `ratio=0.0005`. A model trained without poison may follow the
boosted noise as well: plant `clean`, stamp, and compare.

Deviations: the authors take other images from Tiny-ImageNet. Give yours by `surrogate_images` and `surrogate_labels`;
without them (ours) the surrogate learns the task's own classes, so the attacker reads the whole set, as that of every
attack on a clean model does. The surrogate is of the victim's architecture unless `surrogate` says otherwise; the
authors' is a ResNet-18. The target is consistently the surrogate's last class where theirs has another number in the
last two stages. Its stored statistics are used for the noise, where theirs drift. They optimise in [-1, 1] with step
0.01, which is 0.005 here, and warm up with RAdam at 0.1; ours is SGD at a rate of our own. AGE's "strength 0.2,
tested at 0.6" is read as the factor three.
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
from bdjax.attacks._checks import check_least, check_positive, check_range
from bdjax.attacks._helpers import PoisonConfig
from bdjax.attacks._optimise import to_one_device
from bdjax.attacks._pictures import to_channels, to_unit_range
from bdjax.engine import parallel, run_epoch
from bdjax.errors import InputError
from bdjax.types import ArrayFile, Arrays, Images, Key, Model, Task, to_float, to_uint8


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The surrogate and the noise."""

    target: int = 2
    """Label that a triggered image shall get."""
    ratio: float = 0.05
    """Share of the *whole* training set that is poisoned, in (0, 1]; with clean labels at most the target class's."""
    labels: Literal["all_to_one", "all_to_all", "clean"] = "clean"
    """clean: poison only images of the target class and keep their labels; the others as for every attack."""
    epsilon: float = 16.0
    """Largest change of a value in training, in 255ths, in (0, 255]."""
    boost: float = 3.0
    """Strength at test time over that in training, at least 1."""
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
    """Learning rate of them, positive."""
    epochs: int = 1000
    """Passes over the target class in which the noise is made, at least 1."""
    learning_rate: float = 0.005
    """Of RAdam, for the noise, in units of [0, 1]; positive."""
    batch_size: int = 350
    """Images a step in all three stages, at least 1; all of them where there are fewer."""

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
    """Optimise the noise on a surrogate, or read it from a file.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      {"noise": float32 [H, W, C] in [-epsilon, epsilon]}.

    Raises:
      InputError: the target class has no image, or a file does not fit.
    """
    own = task.images[task.labels == config.target % task.classes]
    if len(own) < parallel.count():
        raise InputError(
            f"attack.target={config.target}: the training set has {len(own)} images of that class; at least one is "
            f"needed for each of {parallel.count()} devices."
        )
    model, images, labels, target = _lesson(config, task, own)
    keys, goals = jax.random.split(key, 3), np.full(len(own), target, np.int32)
    recipe = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}
    variables = task.fit(
        images, labels, keys[0], stage="surrogate", model=model,
        recipe={**recipe, "epochs": config.surrogate_epochs, "learning_rate": config.surrogate_rate,
                "batch_size": _batch(config, images)},
    )  # fmt: skip
    if config.warmup_epochs:
        variables = task.fit(
            own, goals, keys[1], stage="warm-up", model=model, start=variables,
            recipe={**recipe, "epochs": config.warmup_epochs, "learning_rate": config.warmup_rate,
                    "batch_size": _batch(config, own)},
        )  # fmt: skip
    zero, batch = jnp.zeros(task.model.shape), _batch(config, own)
    state, steps = {"noise": zero, "opt": _RADAM.init(zero)}, len(own) // batch
    shared = {
        "variables": to_one_device(variables),
        "images": jnp.asarray(own),
        "target": jnp.int32(target),
        "epsilon": jnp.float32(config.epsilon / 255),
        "rate": jnp.float32(config.learning_rate),
    }
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(keys[2], epoch), len(own))[: steps * batch]
        state, _ = run_epoch(_step(model), state, {"index": order.reshape(steps, batch)}, {}, shared)
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


def _lesson(config: Config, task: Task, own: np.ndarray) -> tuple[Model, np.ndarray, np.ndarray, int]:
    """The surrogate, the images and labels it learns, and which of its classes is the target."""
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
    fitted, target = [], int(labels.max()) + 1
    for part in np.array_split(others, -(-len(others) // 1000)):
        found = to_channels(
            to_unit_range(part, "surrogate_images", config.surrogate_images), task.model.shape[2], "images"
        )
        fitted.append(to_uint8(jax.image.resize(found, (len(found), *task.model.shape), "linear")))
    both = np.concatenate([labels, np.full(len(own), target)]).astype(np.int32)
    return models.create(name, task.model.shape, target + 1), np.concatenate([*fitted, own]), both, target


def _batch(config: Config, images: np.ndarray) -> int:
    """Images a step, a multiple of the devices where that is possible."""
    devices = parallel.count()
    return max(min(config.batch_size, len(images)) // devices, 1) * devices


_RADAM = optax.scale_by_radam()


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = to_float(shared["images"][split["index"]])

        def loss(noise: jax.Array) -> jax.Array:
            logits = model.logits(shared["variables"], jnp.clip(images + noise, 0, 1))
            return -jax.nn.log_softmax(logits)[:, shared["target"]].mean()

        value, gradient = parallel.average(jax.value_and_grad(loss)(state["noise"]), axis)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            update, opt = _RADAM.update(gradient, state["opt"])
        noise = jnp.clip(state["noise"] - shared["rate"] * update, -shared["epsilon"], shared["epsilon"])
        return {"noise": noise, "opt": opt}, {"loss": value}

    return step
