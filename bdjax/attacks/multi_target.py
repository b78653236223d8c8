"""Multi-target: several attacks in one model, each with its own target.

I-BAU's "seven triggers to seven targets": Y. Zeng, S. Chen, W. Park, Z. M. Mao, M. Jin and R. Jia, "Adversarial
Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022, arXiv:2110.03735.

Threat model: the attacker writes the training set, as in BadNets. Each part is an attack of the library with its own
target. It poisons a copy of the whole training set with its own trigger. The victim is trained on all copies, which are
concatenated and shuffled in training: with P parts an image occurs P times per epoch, mostly clean, and an epoch takes
P times as long. The defaults are I-BAU's: 20 % of each of seven copies.

A part is written NAME:TARGET or NAME:TARGET:FIELD=VALUE:..., such as `badnets:0:position=top_left:size=3`; NAME may
be the path of a .py file. A tuple's values are separated by commas.

At test time each image gets each trigger in turn. The ASR of a part counts its own target and leaves out images of that
class; the ASR is the mean over the parts. A part must be an attack that poisons the training set.

Deviations:

- None known for the composition; those of the parts are listed in their own modules.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np

from bdjax import attacks, registry
from bdjax.attacks._poisoning import Part, PoisonConfig, check_target, part_arrays
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Poison, Task

_COMMON = ("ratio", "exclude_target", "quantise")


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The parts; ratio, exclude_target and quantise apply to each of them."""

    target: int = 0
    """Unused: every part has its own."""
    ratio: float = 0.2
    """Share of each *copy* of the training set that is poisoned, in (0, 1]; a part may set its own."""
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
    """List the parts, each with its Config and a label: its name, with _2, _3 ... when it is repeated.

    Raises InputError for an unknown attack or field, a value of the wrong kind, and an attack that cannot be a part.
    """
    listed: list[Part] = []
    for text in config.parts:
        name, target, values = _read(text)
        spec = registry.load("attacks", name)
        if spec.replaces_training or spec.parts is not None:
            raise InputError(f"attack.parts: {name} does not poison a training set, so it cannot be a part.")
        base = {field: getattr(config, field) for field in _COMMON} | {"target": target}
        stem = Path(name).stem
        count = sum(Path(part.attack).stem == stem for part in listed) + 1
        label = stem if count == 1 else f"{stem}_{count}"
        listed.append(Part(label, name, spec.Config(**base | _parse_fields(spec.Config, text, values))))
    return tuple(listed)


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
        spec, part_task = registry.load("attacks", part.attack), _name_stages(task, part.label)
        if spec.prepare is not None:
            prepared = spec.prepare(part.config, part_task, jax.random.fold_in(key, index))
            arrays |= {f"{part.label}/{name}": value for name, value in prepared.items()}
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

    Raises:
      InputError: a part copies the training set itself.
    """
    poisons = [
        attacks.poison(part.attack, part.config, task, jax.random.fold_in(key, i), part_arrays(arrays, part))
        for i, part in enumerate(parts(config))
    ]
    if any(poisoned.copies != 1 for poisoned in poisons):
        raise InputError("attack.parts holds an attack that copies the training set itself; it cannot be a part.")
    return Poison(
        np.concatenate([p.indices + i * len(task.labels) for i, p in enumerate(poisons)]).astype(np.int32),
        np.concatenate([p.images for p in poisons]),
        np.concatenate([p.labels for p in poisons]),
        len(poisons),
    )


def training_hook(config: Config, task: Task, poison: Poison) -> None:
    """Check that no part controls training; there is no hook.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      poison: unused.

    Raises:
      InputError: a part controls training.
    """
    for part in parts(config):
        spec, no_indices = registry.load("attacks", part.attack), np.zeros(0, np.int32)
        no_poison = Poison(no_indices, task.images[:0], no_indices)
        if spec.training_hook is not None and spec.training_hook(part.config, task, no_poison) is not None:
            raise InputError(f"attack.parts: {part.label} as configured controls training; a part cannot.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the trigger of part i mod P on the i-th image, for previews; an ASR puts each part's trigger on all images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: random key.
      arrays: of the parts, as LABEL/NAME.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    listed = parts(config)
    for index, part in enumerate(listed[: len(images)]):
        stamp = attacks.trigger_of(part.attack, part.config, part_arrays(arrays, part))
        chosen = slice(index, None, len(listed))
        images = images.at[chosen].set(stamp(images[chosen], jax.random.fold_in(key, index)))
    return images


def _name_stages(task: Task, label: str) -> Task:
    """Return the task with a part's label in the names of its training stages, which must be unique."""

    def fit(*arguments: Any, stage: str = "training", **options: Any) -> Any:
        return task.fit(*arguments, stage=f"{stage} of {label}", **options)

    def fit_with_hook(*arguments: Any, stage: str = "training", **options: Any) -> Any:
        return task.fit_with_hook(*arguments, stage=f"{stage} of {label}", **options)

    return replace(task, fit=fit, fit_with_hook=fit_with_hook)


def _read(text: str) -> tuple[str, int, dict[str, str]]:
    """Split the text of a part into its name, its target and its fields' values as text."""
    name, *rest = text.split(":")
    target, *entries = rest or [""]
    pairs = [entry.partition("=") for entry in entries]
    values = {field: value for field, _, value in pairs}
    if not name or not target.isdecimal() or not all(field and equals for field, equals, _ in pairs):
        raise InputError(
            f"attack.parts must be NAME:TARGET or NAME:TARGET:FIELD=VALUE:..., such as badnets:0:size=3; got {text!r}."
        )
    if fixed := values.keys() & {"target", "quantise"}:
        raise InputError(f"attack.parts: {min(fixed)} cannot be a field of one part, got {text!r}.")
    return name, int(target), values


def _parse_fields(kind: type, text: str, values: dict[str, str]) -> dict[str, Any]:
    """Convert values from text to the types of the Config class `kind`. Raises InputError when one does not fit."""
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
    if unknown := [name for name in values if name not in names]:
        raise InputError(f"attack.parts: {text!r} has no field {unknown[0]!r}. Known: {', '.join(names)}.")
    parsed = {}
    for name, value in values.items():
        try:
            parsed[name] = _parse_value(hints[name], value)
        except (ValueError, KeyError):
            raise InputError(f"attack.parts: {value!r} is no value for {name}, got {text!r}.") from None
    return parsed


def _parse_value(kind: Any, text: str) -> Any:
    """Convert text to a value of the annotation `kind`. Raises ValueError or KeyError when that is impossible."""
    choices, origin = get_args(kind), get_origin(kind)
    if kind in (int, float):
        return kind(text)
    if kind in (bool, NoneType) or origin is Literal:
        return {str(choice): choice for choice in choices or ((True, False) if kind is bool else (None,))}[text]
    if origin is tuple:
        kinds = choices[:1] * (text.count(",") + 1) if choices[-1] is ... else choices
        return tuple(_parse_value(item, entry) for item, entry in zip(kinds, text.split(","), strict=True))
    for choice in choices:  # of a union
        try:
            return _parse_value(choice, text)
        except (ValueError, KeyError):
            pass
    if choices:
        raise ValueError
    return text
