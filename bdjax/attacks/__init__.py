"""Attacks: one module a method, and what lifts its one function to a planted backdoor.

A module holds `Config` (a frozen dataclass that extends :class:`PoisonConfig`) and `trigger`, what is
done to an image at test time:

    trigger(config, images, key) -> images                 images float32 [N, H, W, C] in [0, 1]

A trigger that needs arrays beyond its Config (a picture from a file, an optimised pattern) makes them
once in `prepare(config, task, key) -> arrays` and gets them as a fourth argument; they are stored with
the victim. An attack that does more than stamp and relabel adds the strongest that it needs of
`poison(config, task, key) -> Poison`, `train(config, task, key) -> Backdoor`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import registry
from bdjax.attacks._helpers import PoisonConfig, check_target, goal, key_per_image, relabel, select
from bdjax.types import Arrays, Backdoor, Images, Key, Poison, Task, Trigger, to_float, to_uint8

__all__ = ["PoisonConfig", "goal", "key_per_image", "plant", "stamped", "trigger_of"]

CHUNK = 1000  # images stamped at a time


def plant(attack: str, config: Any, task: Task, key: Key) -> Backdoor:
    """Plant `attack` in the task's model: prepare, poison, train; what the module does not define is lifted.

    Raises InputError when the config does not fit the task (target, ratio, trigger size ...).
    """
    module = registry.load("attacks", attack)
    check_target(config, task.classes)
    prepare_key, poison_key, fit_key = jax.random.split(key, 3)
    if hasattr(module, "train"):
        return module.train(config, task, key)
    arrays = module.prepare(config, task, prepare_key) if hasattr(module, "prepare") else {}
    made = _poison(module, attack, config, task, poison_key, arrays)
    images, labels = task.images, task.labels.copy()
    if made.images.dtype != images.dtype:
        images = np.asarray(to_float(images))
    images = images.copy()
    images[made.indices], labels[made.indices] = made.images, made.labels
    return Backdoor(attack, config, task.fit(images, labels, fit_key), arrays, made)


def _poison(module: Any, attack: str, config: PoisonConfig, task: Task, key: Key, arrays: Arrays) -> Poison:
    if hasattr(module, "poison"):
        return module.poison(config, task, key, *([arrays] if arrays else []))
    select_key, stamp_key = jax.random.split(key)
    indices = select(config, task.labels, select_key)
    images = stamped(trigger_of(attack, config, arrays), config, task.images[indices], stamp_key)
    return Poison(indices, images, relabel(config, task.labels[indices], task.classes))


def trigger_of(attack: str, config: Any, arrays: Arrays) -> Trigger:
    """The test-time trigger of a planted attack, compiled: `(images, key) -> images`, clipped to [0, 1]."""
    program, stored = _program(registry.load("attacks", attack), config), dict(arrays)
    return lambda images, key: program(images, key, stored)


@lru_cache(maxsize=64)
def _program(module: Any, config: Any) -> Callable:
    def run(images: Images, key: Key, arrays: Arrays) -> Images:
        return jnp.clip(module.trigger(config, images, key, *([arrays] if arrays else [])), 0, 1)

    return jax.jit(run)


def stamped(trigger: Trigger, config: PoisonConfig, images: np.ndarray, key: Key) -> np.ndarray:
    """Stored images [N, H, W, C] with the trigger on; uint8 if config.quantise, else float32 in [0, 1]."""
    parts = []
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        short = CHUNK - len(part) if start else 0  # one shape is compiled, however many images
        part = np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) if short else part
        out = trigger(to_float(part), jax.random.fold_in(key, start))[: CHUNK - short]
        parts.append(to_uint8(out) if config.quantise else np.asarray(out))
    return np.concatenate(parts)
