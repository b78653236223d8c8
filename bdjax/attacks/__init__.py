"""Attacks: one module a method, and what lifts its one function to a planted backdoor.

A module holds `Config` (a frozen dataclass that extends :class:`PoisonConfig`) and `trigger`, what is
done to an image at test time:

    trigger(config, images, key, arrays) -> images         images float32 [N, H, W, C] in [0, 1]

A trigger that needs arrays beyond its Config (a picture from a file, an optimised pattern) makes them
once in `prepare(config, task, key) -> arrays` and gets them as `arrays` (empty without `prepare`); they are stored with
the victim. An attack that trains or edits the model, and whose trigger uses arrays made there, sets
`NEEDS_ARRAYS = True`. Where a poisoned training image carries another trigger than a test image (weaker, or a part of
it), `training_trigger`, of the same arguments, says which; a Config that extends :class:`CoverConfig` has
cover images stamped as well, which keep their labels, and one that extends :class:`SourceConfig` counts as successful
only where it turns images of one class. An attack that does more than stamp and relabel adds
the strongest that it needs of

    poison(config, task, key, arrays) -> Poison            which images become what: cheap, and a function of its inputs
    training_hook(config, task, poison) -> (TrainingHook, attacker) or None    what it does in every training step
    train(config, task, key) -> Backdoor                   the whole planting
    edit(config, variables, task, key) -> Backdoor         the same, from a model that was trained clean

An attack on a *purified* model has another Config, no trigger, and `reactivate(config, defended, backdoor, task, key)
-> Backdoor`; `perturb(config, images, arrays) -> images` if it changes the input and not the weights, and NEEDS, the
names of re-activations that come before it. METRIC is what the ASR after it is called.

An attack made of others defines `parts(config)`, a :class:`Part` for each: what it stores of one is called LABEL/NAME,
and each is measured by its own trigger and target.

What takes long (a surrogate, an optimised pattern) belongs into `prepare`: its arrays are stored, so that the poisoned
training set can be made again (:func:`poisoned_set`).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import registry
from bdjax.attacks._helpers import (
    CoverConfig,
    Part,
    PoisonConfig,
    SourceConfig,
    candidates_of,
    check_target,
    fit_key,
    goal,
    key_per_image,
    keys_of,
    own_arrays,
    part_arrays,
    poisoned_set,
    relabel,
    select,
    select_cover,
)
from bdjax.errors import InputError
from bdjax.types import Arrays, Backdoor, Images, Key, Poison, Task, Trigger, quantise, to_float

__all__ = [
    "CoverConfig", "Part", "PoisonConfig", "SourceConfig", "fit_key", "goal", "key_per_image", "keys_of",
    "own_arrays", "parts_of", "payload", "plant", "poison", "poisoned_set", "stamped", "trigger_of",
]  # fmt: skip

CHUNK = 500  # images stamped at a time: what they need stays in a cache


def plant(attack: str, config: Any, task: Task, key: Key) -> Backdoor:
    """Plant `attack` in the task's model: prepare, poison, train; what the module does not define is lifted.

    Raises InputError when the config does not fit the task (target, ratio, trigger size ...).
    """
    module = registry.load("attacks", attack)
    if not hasattr(module, "trigger"):
        raise InputError(f"{attack} attacks a purified model and plants nothing. Use `bdjax reactivate DIR {attack}`.")
    check_target(config, task.classes)
    if hasattr(module, "train"):
        return module.train(config, task, key)
    if hasattr(module, "edit"):
        return module.edit(config, task.clean(), task, key)
    if not hasattr(module, "poison"):
        candidates_of(config, task.labels)  # refuses a ratio before what may take long
    arrays = module.prepare(config, task, keys_of(key).prepare) if hasattr(module, "prepare") else {}
    made = poison(attack, config, task, key, arrays)
    images, labels = poisoned_set(made, task.images, task.labels)
    hook = module.training_hook(config, task, made) if hasattr(module, "training_hook") else None
    if hook is None:
        return Backdoor(attack, config, task.fit(images, labels, fit_key(key)), arrays, made)
    variables, _ = task.fit_with_hook(images, labels, fit_key(key), *hook)
    return Backdoor(attack, config, variables, arrays, made)


def poison(attack: str, config: Any, task: Task, key: Key, arrays: Arrays) -> Poison:
    """The poisoned images of :func:`plant` with the same arguments, once its arrays are prepared."""
    module, key = registry.load("attacks", attack), keys_of(key).poison
    if hasattr(module, "poison"):
        return module.poison(config, task, key, arrays)
    select_key, stamp_key = jax.random.split(key)
    poisoned = select(config, task.labels, select_key)
    cover = select_cover(config, task.labels, poisoned, jax.random.fold_in(select_key, 1))
    labels = task.labels.astype(np.int32)
    labels[poisoned] = relabel(config, labels[poisoned], task.classes)
    indices = np.sort(np.concatenate([poisoned, cover]))
    images = stamped(attack, config, task.images[indices], stamp_key, arrays, training=True)
    return Poison(indices, images, labels[indices])


def payload(
    attack: str, config: Any, task: Task, keys: tuple[Key, Key], arrays: Arrays, count: int, anew: bool
) -> Poison:
    """A few images that carry the training trigger and the attacker's label, for a re-activation attack.

    They are drawn from the poisoned ones of :func:`plant` (covers left out); with `anew`, and for an attack that has no
    poisoned set, from the training images that the attack aims at, stamped now.

    Args: keys: of the draw, and the one that the attack was planted with; arrays: as stored with the victim.
    Raises InputError when there are fewer than `count`.
    """
    module, (key, planted) = registry.load("attacks", attack), keys
    if anew or any(hasattr(module, kind) for kind in ("train", "edit")):
        wanted, eligible = goal(config, task.labels, task.classes)
        pool = np.flatnonzero(eligible)
        chosen = np.sort(_draw(key, pool, count, f"training images that {attack} aims at"))
        images = stamped(attack, config, task.images[chosen], key, arrays, training=True)
        return Poison(chosen, images, wanted[chosen])
    made = poison(attack, config, task, planted, arrays)
    before = task.labels[made.indices % len(task.labels)]
    own = made.labels == config.target if config.labels == "clean" else made.labels != before
    chosen = np.sort(_draw(key, np.flatnonzero(own), count, "poisoned images (covers left out)"))
    return Poison(made.indices[chosen], made.images[chosen], made.labels[chosen], made.copies)


def _draw(key: Key, pool: np.ndarray, count: int, what: str) -> np.ndarray:
    if count > len(pool):
        raise InputError(f"attack.count={count}, but there are {len(pool)} {what}. Use a smaller --attack.count.")
    return pool[np.asarray(jax.random.permutation(key, len(pool)))[:count]]


def trigger_of(attack: str, config: Any, arrays: Arrays, training: bool = False) -> Trigger:
    """The test-time trigger of a planted attack, compiled: `(images, key) -> images`, clipped to [0, 1].

    `training`: the one that its poisoned training images carry, which is the same for most attacks.
    """
    program, stored = _program(_stamp_of(attack, training), config), dict(arrays)
    return lambda images, key: program(images, key, stored)


def parts_of(attack: str, config: Any, arrays: Arrays) -> list[tuple[Part, Arrays]]:
    """The attacks that are measured on their own, with their arrays: the parts, or the attack itself, labelled ""."""
    module = registry.load("attacks", attack)
    if not hasattr(module, "parts"):
        return [(Part("", attack, config), arrays)]
    return [(part, part_arrays(arrays, part)) for part in module.parts(config)]


def stamped(
    attack: str, config: PoisonConfig, images: np.ndarray, key: Key, arrays: Arrays, training: bool = False
) -> np.ndarray:
    """Stored images [N, H, W, C] with the trigger on; uint8 if config.quantise, else float32 in [0, 1].

    `training`: as in :func:`trigger_of`.
    """
    program, arrays = _program(_stamp_of(attack, training), config, stored=True), jax.device_put(dict(arrays))
    out = np.empty(images.shape, np.uint8 if config.quantise else np.float32)

    def stamp(start: int) -> None:
        part = images[start : start + CHUNK]
        short = CHUNK - len(part) if start else 0  # one shape is compiled, however many images
        part = np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) if short else part
        out[start : start + CHUNK] = np.asarray(program(part, key, arrays, start))[: len(images) - start]

    if len(images):
        stamp(0)  # alone, for it compiles
    with ThreadPoolExecutor(3) as pool:  # one piece is copied in and one out while another is computed
        list(pool.map(stamp, range(CHUNK, len(images), CHUNK)))
    return out


def _stamp_of(attack: str, training: bool) -> Callable:
    module = registry.load("attacks", attack)
    return getattr(module, "training_trigger", module.trigger) if training else module.trigger


@lru_cache(maxsize=128)
def _program(stamp: Callable, config: Any, stored: bool = False) -> Callable:
    """`stored`: from stored images to stored ones, in one program that keeps no image of floats."""

    def run(images: Images, key: Key, arrays: Arrays) -> Images:
        return jnp.clip(stamp(config, images, key, arrays), 0, 1)

    def run_stored(images: Images, key: Key, arrays: Arrays, start: jax.Array) -> Images:
        out = run(to_float(images), jax.random.fold_in(key, start), arrays)
        return quantise(out) if config.quantise else out

    return jax.jit(run_stored if stored else run)
