"""Attacks: one module per method, and the common procedure that turns its functions into a planted backdoor.

A module defines `Config` (a frozen dataclass that extends :class:`PoisonConfig`) and `trigger`, which is
applied to images at test time:

    trigger(config, images, key, arrays) -> images         images float32 [N, H, W, C] in [0, 1]

A trigger that needs arrays beyond its Config (a picture from a file, an optimised pattern) makes them once in
`prepare(config, task, key) -> arrays` and receives them as `arrays` (empty without `prepare`); they are stored with the
victim. An attack that trains or edits the model, and whose trigger uses arrays made there, sets `NEEDS_ARRAYS = True`.
If poisoned training images carry another trigger than test images (weaker, or a part of it), `training_trigger`, with
the same arguments, applies it. A Config that extends :class:`CoverConfig` adds cover images, which carry the trigger
and keep their labels; with one that extends :class:`SourceConfig` the ASR counts images of one class only.

An attack that does more than stamp and relabel defines the most general function that it needs of

    poison(config, task, key, arrays) -> Poison            which images become what: cheap and deterministic
    training_hook(config, task, poison) -> (TrainingHook, attacker) or None    what it changes in every training step
    train(config, task, key) -> Backdoor                   the whole training
    edit(config, variables, task, key) -> Backdoor         a change of a model that was trained without poison

An attack on a *purified* model has another Config, no trigger, and `reactivate(config, inputs, backdoor, task, key) ->
Backdoor`; also `perturb(config, images, arrays) -> images` if it changes the inputs and not the weights, NEEDS (the
names of re-activation attacks that come before it) and METRIC (what the ASR after it is called).

An attack that is composed of others defines `parts(config)`, a :class:`Part` for each: its arrays are stored as
LABEL/NAME, and it is measured by its own trigger and target.

Whatever takes long (a surrogate, an optimised pattern) belongs in `prepare`: its arrays are stored, so that the
poisoned training set can be made again (:func:`poisoned_set`). :mod:`bdjax.protocols` has the types.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import registry
from bdjax.attacks._poisoning import (
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
    part_arrays,
    poisoned_set,
    relabel,
    select,
    select_cover,
    without_previews,
)
from bdjax.errors import InputError
from bdjax.protocols import AttackSpec
from bdjax.types import Arrays, Backdoor, Images, Key, Poison, Task, Trigger, quantise, to_float

__all__ = [
    "CoverConfig", "Part", "PoisonConfig", "SourceConfig", "fit_key", "goal", "key_per_image", "keys_of",
    "load_planting", "parts_of", "payload", "plant", "poison", "poisoned_set", "stamped", "trigger_of",
    "without_previews",
]  # fmt: skip

CHUNK = 500
"""Images stamped at a time, so that they stay in the cache."""


def load_planting(attack: str) -> AttackSpec:
    """Load an attack that plants a backdoor. Raises InputError for one that re-activates a purified model."""
    spec = registry.load("attacks", attack)
    if spec.trigger is None:
        raise InputError(f"{attack} attacks a purified model and plants nothing. Use `bdjax reactivate DIR {attack}`.")
    return spec


def plant(attack: str, config: Any, task: Task, key: Key) -> Backdoor:
    """Plant an attack in the task's model: prepare, poison, train.

    Args:
      attack: its name.
      config: its Config.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The planted backdoor.

    Raises:
      InputError: the config does not fit the task (target, ratio, trigger size ...), or the attack plants nothing.
    """
    spec = load_planting(attack)
    check_target(config, task.classes)
    if spec.train is not None:
        return spec.train(config, task, key)
    if spec.edit is not None:
        return spec.edit(config, task.clean(), task, key)
    if spec.poison is None:
        candidates_of(config, task.labels)  # check the ratio before the slow stages
    arrays = {} if spec.prepare is None else spec.prepare(config, task, keys_of(key).prepare)
    poisoned = poison(attack, config, task, key, arrays)
    images, labels = poisoned_set(poisoned, task.images, task.labels)
    hook = None if spec.training_hook is None else spec.training_hook(config, task, poisoned)
    if hook is None:
        return Backdoor(attack, config, task.fit(images, labels, fit_key(key)), arrays, poisoned)
    variables, _ = task.fit_with_hook(images, labels, fit_key(key), *hook)
    return Backdoor(attack, config, variables, arrays, poisoned)


def poison(attack: str, config: Any, task: Task, key: Key, arrays: Arrays) -> Poison:
    """Make the poisoned images that :func:`plant` trains on.

    Args:
      attack: its name.
      config: its Config.
      task: the training set.
      key: the key that `plant` gets.
      arrays: of `prepare`.

    Returns:
      Positions, images and labels of the poisoned images.
    """
    spec, key = registry.load("attacks", attack), keys_of(key).poison
    if spec.poison is not None:
        return spec.poison(config, task, key, arrays)
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
    """Draw a few images with the training trigger and the attacker's label, for a re-activation attack.

    They are drawn from the poisoned images of :func:`plant`, without cover images; with `anew`, and for an attack that
    has no poisoned set, training images that the attack aims at are drawn and stamped now.

    Args:
      attack: name of the attack that was planted.
      config: its Config.
      task: the training set.
      keys: (key of this draw, key that the attack was planted with).
      arrays: of the attack, as stored with the victim.
      count: number of images.
      anew: stamp images now.

    Returns:
      `count` poisoned images.

    Raises:
      InputError: there are fewer.
    """
    spec, (key, planting_key) = registry.load("attacks", attack), keys
    if anew or spec.replaces_training:
        goals, eligible = goal(config, task.labels, task.classes)
        drawn = np.sort(_draw(key, np.flatnonzero(eligible), count, f"training images that {attack} aims at"))
        images = stamped(attack, config, task.images[drawn], key, arrays, training=True)
        return Poison(drawn, images, goals[drawn])
    poisoned = poison(attack, config, task, planting_key, arrays)
    before = task.labels[poisoned.indices % len(task.labels)]
    not_cover = poisoned.labels == config.target if config.labels == "clean" else poisoned.labels != before
    drawn = np.sort(_draw(key, np.flatnonzero(not_cover), count, "poisoned images (covers left out)"))
    return Poison(poisoned.indices[drawn], poisoned.images[drawn], poisoned.labels[drawn], poisoned.copies)


def _draw(key: Key, pool: np.ndarray, count: int, description: str) -> np.ndarray:
    """Draw `count` entries of `pool` without replacement. Raises InputError when it has fewer."""
    if count > len(pool):
        raise InputError(
            f"attack.count={count}, but there are {len(pool)} {description}. Use a smaller --attack.count."
        )
    return pool[np.asarray(jax.random.permutation(key, len(pool)))[:count]]


def trigger_of(attack: str, config: Any, arrays: Arrays, training: bool = False) -> Trigger:
    """Compile the trigger of a planted attack.

    Args:
      attack: its name.
      config: its Config.
      arrays: of the trigger.
      training: the trigger of poisoned training images, which for most attacks is the same.

    Returns:
      `(images, key) -> images`, clipped to [0, 1].
    """
    program, stored = _program(_trigger_function(attack, training), config), dict(arrays)
    return lambda images, key: program(images, key, stored)


def parts_of(attack: str, config: Any, arrays: Arrays) -> list[tuple[Part, Arrays]]:
    """List the attacks that are measured on their own.

    Args:
      attack: its name.
      config: its Config.
      arrays: stored with the victim.

    Returns:
      (part, its arrays) for each part; for an attack without parts itself, labelled "".
    """
    spec = registry.load("attacks", attack)
    if spec.parts is None:
        return [(Part("", attack, config), arrays)]
    return [(part, part_arrays(arrays, part)) for part in spec.parts(config)]


def stamped(
    attack: str, config: PoisonConfig, images: np.ndarray, key: Key, arrays: Arrays, training: bool = False
) -> np.ndarray:
    """Put the trigger on stored images.

    Args:
      attack: its name.
      config: its Config.
      images: stored [N, H, W, C].
      key: random key.
      arrays: of the trigger.
      training: as in :func:`trigger_of`.

    Returns:
      [N, H, W, C]; uint8 if config.quantise, else float32 in [0, 1].
    """
    program, arrays = _program(_trigger_function(attack, training), config, stored=True), jax.device_put(dict(arrays))
    out = np.empty(images.shape, np.uint8 if config.quantise else np.float32)

    def stamp(start: int) -> None:
        chunk = images[start : start + CHUNK]
        missing = CHUNK - len(chunk) if start else 0  # one shape is compiled, however many images
        chunk = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), chunk.dtype)]) if missing else chunk
        out[start : start + CHUNK] = np.asarray(program(chunk, key, arrays, start))[: len(images) - start]

    if len(images):
        stamp(0)  # alone, because it compiles
    with ThreadPoolExecutor(3) as pool:  # one chunk is copied in and one out while another is computed
        list(pool.map(stamp, range(CHUNK, len(images), CHUNK)))
    return out


def _trigger_function(attack: str, training: bool) -> Callable:
    """The trigger function of an attack. Raises InputError when it has none."""
    spec = registry.load("attacks", attack)
    function = spec.training_trigger if training else spec.trigger
    if function is None:
        raise InputError(f"{attack} attacks a purified model and has no trigger.")
    return function


@lru_cache(maxsize=128)
def _program(trigger: Callable, config: Any, stored: bool = False) -> Callable:
    """Compile a trigger; `stored`: from stored to stored images in one program that keeps no float images."""

    def run(images: Images, key: Key, arrays: Arrays) -> Images:
        return jnp.clip(trigger(config, images, key, arrays), 0, 1)

    def run_stored(images: Images, key: Key, arrays: Arrays, start: jax.Array) -> Images:
        out = run(to_float(images), jax.random.fold_in(key, start), arrays)
        return quantise(out) if config.quantise else out

    return jax.jit(run_stored if stored else run)
