"""The contracts of method modules: the functions that a module may define, and the Spec that the registry makes of it.

A method is a module; the registry reads it once into a Spec. Nothing else looks into a module: a function that a
method does not define is None in its Spec.
"""

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from bdjax.errors import InputError
from bdjax.types import (
    Arrays,
    Backdoor,
    Data,
    DefenderView,
    Images,
    Key,
    Poison,
    ReactivationInputs,
    Scores,
    Task,
    TrainingHook,
    Variables,
    Victim,
)


class TriggerFunction(Protocol):
    """Put a trigger on float32 images [N, H, W, C] in [0, 1], inside jit; the caller clips the result to [0, 1].

    `arrays` are what `prepare` or the training made for this attack, by name; empty where there is nothing.
    """

    def __call__(self, config: Any, images: Images, key: Key, arrays: Arrays) -> Images: ...


class PrepareFunction(Protocol):
    """Make the arrays that a trigger needs (a pattern, a mask, a surrogate's gradient); they are stored."""

    def __call__(self, config: Any, task: Task, key: Key) -> Arrays: ...


class PoisonFunction(Protocol):
    """Choose, stamp and relabel the poisoned training images: cheap and deterministic."""

    def __call__(self, config: Any, task: Task, key: Key, arrays: Arrays) -> Poison: ...


class HookFunction(Protocol):
    """Decide what the attacker changes in every training step: the hook and the attacker's arrays, or None."""

    def __call__(self, config: Any, task: Task, poison: Poison) -> tuple[TrainingHook, Any] | None: ...


class TrainFunction(Protocol):
    """Plant the backdoor by a training procedure of the attack's own."""

    def __call__(self, config: Any, task: Task, key: Key) -> Backdoor: ...


class EditFunction(Protocol):
    """Plant the backdoor into a model that was trained without poison."""

    def __call__(self, config: Any, variables: Variables, task: Task, key: Key) -> Backdoor: ...


class ReactivateFunction(Protocol):
    """Attack a purified model to bring its backdoor back."""

    def __call__(
        self, config: Any, inputs: ReactivationInputs, backdoor: Backdoor, task: Task, key: Key
    ) -> Backdoor: ...


class PerturbFunction(Protocol):
    """Change the float32 images [N, H, W, C] in [0, 1] that a purified model is given, inside jit."""

    def __call__(self, config: Any, images: Images, arrays: Arrays) -> Images: ...


class PurifyFunction(Protocol):
    """Remove a backdoor with clean images only."""

    def __call__(self, config: Any, victim: Victim, view: DefenderView, key: Key) -> Variables: ...


class DefendedTrainFunction(Protocol):
    """Train a new model on the task's training set, which is poisoned, so that it learns no backdoor."""

    def __call__(self, config: Any, task: Task, key: Key) -> Variables: ...


class DetectFunction(Protocol):
    """Decide whether a model is backdoored, and towards which class."""

    def __call__(self, config: Any, victim: Victim, view: DefenderView, key: Key) -> Scores: ...


@dataclass(frozen=True)
class AttackSpec:
    """An attack module as the registry read it. A function that the module does not define is None."""

    name: str
    """Name in bdjax.attacks, or the path of a user's file."""
    Config: type
    """Frozen dataclass of the hyper-parameters."""
    trigger: TriggerFunction | None = None
    """What is done to an image at test time. None: the attack re-activates and plants nothing."""
    training_trigger: TriggerFunction | None = None
    """What is done to a poisoned training image: `trigger` unless the module says otherwise."""
    prepare: PrepareFunction | None = None
    poison: PoisonFunction | None = None
    training_hook: HookFunction | None = None
    train: TrainFunction | None = None
    edit: EditFunction | None = None
    parts: Callable[[Any], Sequence[Any]] | None = None
    """`parts(config)`: the attacks that this one is made of (see :class:`bdjax.attacks.Part`)."""
    needs_arrays: bool = False
    """The trigger uses arrays that only the training of a victim makes (the module's NEEDS_ARRAYS)."""
    reactivate: ReactivateFunction | None = None
    perturb: PerturbFunction | None = None
    needs: tuple[str, ...] = ()
    """Re-activation attacks that come before this one (the module's NEEDS)."""
    metric: str = "ASR after"
    """What the ASR after a re-activation is called (the module's METRIC)."""

    @property
    def replaces_training(self) -> bool:
        """Whether the attack trains or edits the model itself, so that no fixed poisoned training set exists."""
        return self.train is not None or self.edit is not None


@dataclass(frozen=True)
class DefenseSpec:
    """A defense module as the registry read it."""

    name: str
    """Name in bdjax.defenses, or the path of a user's file."""
    Config: type
    """Frozen dataclass of the hyper-parameters."""
    purify: PurifyFunction
    detect: DetectFunction | None = None
    """Detection by the same Config, for a defense that also detects and does not report it while it purifies."""
    train: DefendedTrainFunction | None = None
    """For a defense that is given the poisoned training set in place of the victim; its `purify` is then refused."""
    trigger_needed: bool | str = False
    """Whether the defense is given the true trigger; a string names the Config's field that decides."""

    def needs_trigger(self, config: Any) -> bool:
        """Whether the defense with this Config is given the true trigger."""
        needed = self.trigger_needed
        return bool(getattr(config, needed) if isinstance(needed, str) else needed)


@dataclass(frozen=True)
class DetectorSpec:
    """A detector module as the registry read it."""

    name: str
    """Name in bdjax.detectors, or the path of a user's file."""
    Config: type
    """Frozen dataclass of the hyper-parameters."""
    detect: DetectFunction
    on_request: bool = False
    """Runs only when it is named (the module's ON_REQUEST)."""
    needs_images: bool = True
    """Whether it uses clean images (the module's NEEDS_IMAGES)."""


@dataclass(frozen=True)
class ModelSpec:
    """A model module as the registry read it."""

    name: str
    """Name in bdjax.models, or the path of a user's file."""
    Net: Any
    """Linen class `Net(classes, dtype, axis_name)`."""
    smallest: int
    """Least side of an image, in pixels."""
    variants: Mapping[str, Container[Any]]
    """Options of `Net` and the values that they may have."""

    @property
    def has_width(self) -> bool:
        """Whether the network can be made narrower or wider."""
        return hasattr(self.Net, "width")


@dataclass(frozen=True)
class DatasetSpec:
    """A data set module as the registry read it."""

    name: str
    """Name in bdjax.datasets, or the path of a user's file."""
    load: Callable[[str], Data]
    """`load(rest)`: the data set; `rest` is what follows the colon of NAME:REST."""


Spec = AttackSpec | DefenseSpec | DetectorSpec | ModelSpec | DatasetSpec


def read_spec(kind: str, name: str, module: ModuleType) -> Spec:
    """Read a method module into its Spec.

    Args:
      kind: "attacks", "defenses", "detectors", "models" or "datasets".
      name: of the method, or the path of a user's file.
      module: the imported module.

    Returns:
      The Spec.

    Raises:
      InputError: the module lacks what its kind must define.
    """
    return _READERS[kind](name, module)


def _function(name: str, module: ModuleType, function: str, purpose: str) -> Callable[..., Any]:
    """A function that a module must define. Raises InputError when it does not."""
    defined: Callable[..., Any] | None = getattr(module, function.partition("(")[0], None)
    if defined is None or not callable(defined):
        raise InputError(f"{name} has no function `{function}`, {purpose}: add one.")
    return defined


def _attack(name: str, module: ModuleType) -> AttackSpec:
    optional = ("trigger", "prepare", "poison", "training_hook", "train", "edit", "parts", "reactivate", "perturb")
    functions = {function: getattr(module, function, None) for function in optional}
    training_trigger = getattr(module, "training_trigger", functions["trigger"])
    _check_trigger(name, "trigger", functions["trigger"])
    _check_trigger(name, "training_trigger", training_trigger)
    return AttackSpec(
        name,
        _config(name, module),
        **functions,
        training_trigger=training_trigger,
        needs_arrays=getattr(module, "NEEDS_ARRAYS", False),
        needs=tuple(getattr(module, "NEEDS", ())),
        metric=getattr(module, "METRIC", AttackSpec.metric),
    )


def _check_trigger(name: str, function: str, trigger: Any) -> None:
    """Raise InputError when a trigger function cannot be called with its four arguments."""
    if trigger is None:
        return
    try:
        inspect.signature(trigger).bind(None, None, None, None)
    except TypeError:
        raise InputError(
            f"{name}: `{function}` must take four arguments, {function}(config, images, key, arrays). The fourth, "
            "arrays, holds what `prepare` returned and is empty for an attack without it: add it."
        ) from None


def _defense(name: str, module: ModuleType) -> DefenseSpec:
    if not hasattr(module, "purify") and hasattr(module, "detect"):
        raise InputError(f"{name} detects backdoors and removes none. Use `bdjax audit DIR --methods {name}`.")
    train: DefendedTrainFunction | None = getattr(module, "train", None)
    if train is not None and not hasattr(module, "purify"):
        purify: PurifyFunction = _refused_purify(name)
    else:
        purify = _function(name, module, "purify(config, victim, view, key)", "which makes it a defense")
    return DefenseSpec(
        name,
        _config(name, module),
        purify,
        getattr(module, "detect", None),
        train,
        getattr(module, "NEEDS_TRIGGER", False),
    )


def _refused_purify(name: str) -> PurifyFunction:
    """Return the `purify` of a defense that trains a new model: it raises InputError."""

    def purify(config: Any, victim: Victim, view: DefenderView, key: Key) -> Variables:
        raise InputError(
            f"{name} trains a new model on the poisoned training set and purifies none. Use `bdjax defend DIR {name}` "
            "with the directory of a victim, or a defense that purifies."
        )

    return purify


def _detector(name: str, module: ModuleType) -> DetectorSpec:
    detect = _function(name, module, "detect(config, victim, view, key)", "which makes it a detector")
    options = {
        field.lower(): getattr(module, field) for field in ("ON_REQUEST", "NEEDS_IMAGES") if hasattr(module, field)
    }
    return DetectorSpec(name, _config(name, module), detect, **options)


def _model(name: str, module: ModuleType) -> ModelSpec:
    return ModelSpec(name, module.Net, module.SMALLEST, getattr(module, "VARIANTS", {}))


def _dataset(name: str, module: ModuleType) -> DatasetSpec:
    return DatasetSpec(name, _function(name, module, "load(rest: str) -> Data", "which makes it a data set"))


def _config(name: str, module: ModuleType) -> type:
    """The class `Config` of a module. Raises InputError when there is none."""
    if not isinstance(config := getattr(module, "Config", None), type):
        raise InputError(f"{name} has no class Config, a frozen dataclass of its hyper-parameters: add one.")
    return config


_READERS: dict[str, Callable[[str, ModuleType], Spec]] = {
    "attacks": _attack, "defenses": _defense, "detectors": _detector, "models": _model, "datasets": _dataset,
}  # fmt: skip
