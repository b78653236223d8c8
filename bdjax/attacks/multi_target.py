"""Multi-target: several attacks in one model, each with its own target (I-BAU, Zeng et al., ICLR 2022: "seven
triggers to seven targets").

Threat model: as BadNets, the attacker writes the training set. Each part is an attack of the library with its target.
It poisons a copy of the whole training set by its own trigger; the victim learns from all copies, one after the other
in the array and shuffled in training, so that with P parts an image is seen P times an epoch, mostly clean, and an
epoch takes P times as long. The defaults are I-BAU's: 20 % of each of seven copies.

A part is written NAME:TARGET or NAME:TARGET:FIELD=VALUE:..., such as `badnets:0:position=top_left:size=3`; NAME may
be the path of a .py file. A tuple's values are separated by commas.

At test time each image gets each trigger in turn: the ASR of a part counts its own target and leaves out images of
that class, the ASR is the mean over the parts. A part must be an attack that poisons the training set.

Deviations: none known; those of the parts are listed in their modules.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np

from bdjax import attacks, registry
from bdjax.attacks._helpers import Part, PoisonConfig, check_target, part_arrays
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Poison, Task

_COMMON = ("ratio", "exclude_target", "quantise")


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The parts. What is said here of ratio, exclude_target and quantise holds for each of them."""

    target: int = 0
    """Not used: every part has its own."""
    ratio: float = 0.2
    """Share of each *copy* of the training set that is poisoned, in (0, 1]; a part may say otherwise."""
    parts: tuple[str, ...] = (
        "trojan_wm:9", "trojan_sq:2", "badnets:0", "smooth:1", "blended:3", "l0_inv:4", "l2_inv:5",
    )  # fmt: skip
    """NAME:TARGET or NAME:TARGET:FIELD=VALUE:..., at least one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels != "all_to_one":
            raise InputError(
                f"attack.labels must be all_to_one, got {self.labels}. Give it to a part: sig:3:labels=clean."
            )
        if not self.parts:
            raise InputError("attack.parts must name at least one attack, such as badnets:0.")
        for text in self.parts:
            _read(text)


def parts(config: Config) -> tuple[Part, ...]:
    """The attacks, each with its Config and a label: its name, with _2, _3 ... when it comes again.

    Raises InputError for an unknown attack or field, a value of the wrong kind, and an attack that cannot be a part.
    """
    found: list[Part] = []
    for text in config.parts:
        name, target, given = _read(text)
        spec = registry.load("attacks", name)
        if spec.replaces_training or spec.parts is not None:
            raise InputError(f"attack.parts: {name} does not poison a training set, so it cannot be a part.")
        base = {field: getattr(config, field) for field in _COMMON} | {"target": target}
        stem = Path(name).stem
        times = sum(Path(part.attack).stem == stem for part in found) + 1
        label = stem if times == 1 else f"{stem}_{times}"
        found.append(Part(label, name, spec.Config(**base | _fields_of(spec.Config, text, given))))
    return tuple(found)


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Prepare the arrays of all parts.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The arrays, as LABEL/NAME.

    Raises:
      InputError: a part or its target does not fit.
    """
    arrays: dict[str, Any] = {}
    for index, part in enumerate(parts(config)):
        check_target(part.config, task.classes)
        spec, own = registry.load("attacks", part.attack), _named(task, part.label)
        if spec.prepare is not None:
            made = spec.prepare(part.config, own, jax.random.fold_in(key, index))
            arrays |= {f"{part.label}/{name}": value for name, value in made.items()}
    return arrays


def poison(config: Config, task: Task, key: Key, arrays: Arrays) -> Poison:
    """Poison the i-th copy of the training set by the i-th part.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.
      arrays: of the parts, as LABEL/NAME.

    Returns:
      The poisoned images of all copies.
    """
    made = [
        attacks.poison(part.attack, part.config, task, jax.random.fold_in(key, i), part_arrays(arrays, part))
        for i, part in enumerate(parts(config))
    ]
    if any(one.copies != 1 for one in made):
        raise InputError("attack.parts holds an attack that copies the training set itself; it cannot be a part.")
    return Poison(
        np.concatenate([one.indices + i * len(task.labels) for i, one in enumerate(made)]).astype(np.int32),
        np.concatenate([one.images for one in made]),
        np.concatenate([one.labels for one in made]),
        len(made),
    )


def training_hook(config: Config, task: Task, poison: Poison) -> None:
    """Refuse parts that act in every training step.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      poison: the poisoned images.

    Raises:
      InputError: a part does.
    """
    for part in parts(config):
        spec, nothing = registry.load("attacks", part.attack), np.zeros(0, np.int32)
        none = Poison(nothing, task.images[:0], nothing)
        if spec.training_hook is not None and spec.training_hook(part.config, task, none) is not None:
            raise InputError(f"attack.parts: {part.label} as configured controls training; a part cannot.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the trigger of part i mod P on the i-th image: a sample, because an ASR puts each part's on all images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: random key.
      arrays: of the parts, as LABEL/NAME.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    own = parts(config)
    for index, part in enumerate(own[: len(images)]):
        stamp = attacks.trigger_of(part.attack, part.config, part_arrays(arrays, part))
        turn = slice(index, None, len(own))
        images = images.at[turn].set(stamp(images[turn], jax.random.fold_in(key, index)))
    return images


def _named(task: Task, label: str) -> Task:
    """The task with the stages of training called after the part, for each name is used once."""

    def fit(*arguments: Any, stage: str = "training", **options: Any) -> Any:
        return task.fit(*arguments, stage=f"{stage} of {label}", **options)

    def fit_with_hook(*arguments: Any, stage: str = "training", **options: Any) -> Any:
        return task.fit_with_hook(*arguments, stage=f"{stage} of {label}", **options)

    return replace(task, fit=fit, fit_with_hook=fit_with_hook)


def _read(text: str) -> tuple[str, int, dict[str, str]]:
    """NAME, TARGET and FIELD -> VALUE as written."""
    name, *rest = text.split(":")
    target, *entries = rest or [""]
    pairs = [entry.partition("=") for entry in entries]
    given = {field: value for field, _, value in pairs}
    if not name or not target.isdecimal() or not all(field and equals for field, equals, _ in pairs):
        raise InputError(
            f"attack.parts must be NAME:TARGET or NAME:TARGET:FIELD=VALUE:..., such as badnets:0:size=3; got {text!r}."
        )
    if fixed := given.keys() & {"target", "quantise"}:
        raise InputError(f"attack.parts: {min(fixed)} cannot be a field of one part, got {text!r}.")
    return name, int(target), given


def _fields_of(kind: type, text: str, given: dict[str, str]) -> dict[str, Any]:
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"attack.parts: {text!r} has no field {unknown[0]!r}. Known: {', '.join(names)}.")
    found = {}
    for name, value in given.items():
        try:
            found[name] = _value(hints[name], value)
        except (ValueError, KeyError):
            raise InputError(f"attack.parts: {value!r} is no value for {name}, got {text!r}.") from None
    return found


def _value(kind: Any, text: str) -> Any:
    """`text` as a value of the annotation `kind`. Raises ValueError or KeyError when it is none."""
    choices, origin = get_args(kind), get_origin(kind)
    if kind in (int, float):
        return kind(text)
    if kind in (bool, NoneType) or origin is Literal:
        return {str(choice): choice for choice in choices or ((True, False) if kind is bool else (None,))}[text]
    if origin is tuple:
        kinds = choices[:1] * (text.count(",") + 1) if choices[-1] is ... else choices
        return tuple(_value(one, entry) for one, entry in zip(kinds, text.split(","), strict=True))
    for choice in choices:  # of a union
        try:
            return _value(choice, text)
        except (ValueError, KeyError):
            pass
    if choices:
        raise ValueError
    return text
