"""Configuration of experiments as dataclasses, with canonical JSON and content hashes."""

import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax import registry
from bdjax.errors import InputError, check_fields
from bdjax.io import records
from bdjax.io.files import sha256
from bdjax.types import ArrayFile


@dataclass(frozen=True)
class FitConfig:
    """Training recipe of a model."""

    epochs: int = 20
    """Number of passes over the training set."""
    batch_size: int = 128
    """Images per step over all devices; a smaller last batch is dropped."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (default betas) or SGD with `momentum`."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """L2 term added to the gradient before momentum, as PyTorch does; biases and BN are decayed too."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning-rate schedule: constant, cosine to zero, or times 0.1 at 50 % and 75 % of the epochs."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "none"
    """Data augmentation: random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations; parameters and the loss are float32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"fit.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"fit.learning_rate must be positive and finite, got {self.learning_rate}.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"fit.momentum must be in [0, 1), got {self.momentum}.")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"fit.weight_decay must be zero or more and finite, got {self.weight_decay}.")

    @property
    def dtype(self) -> Any:
        """Dtype for `models.create`."""
        return jnp.dtype(self.precision)


@dataclass(frozen=True)
class SplitConfig:
    """Selection of the defender's clean images, which are never part of the evaluation set."""

    source: Literal["test", "train", "all"] = "test"
    """Split that they are drawn from: test (BAERASER, I-BAU, AGE), or train (BI-BAU, BackdoorBench; always the clean
    originals); all: both, with the rest of both as the evaluation set."""
    size: int | None = None
    """Number of images; default: half of the test split or of all images, or 5 % of the training split."""
    order: Literal["shuffled", "given", "stratified"] = "shuffled"
    """shuffled: drawn with the seed; given: the first images in file order, as in I-BAU's release; stratified: drawn
    within each class in proportion to its size, with at least one on each side if the class has two images."""
    validation: float = 0.2
    """Fraction of them in [0, 1) that is held out to select a round of the defense by accuracy. 0: the defense uses all
    images and nothing is selected, as in the papers; the same applies if the fraction is fewer than 10 images."""
    largest_drop: float = 0.1
    """Drop of validation accuracy, as a fraction in [0, 1], beyond which an earlier round is returned."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "split",
            (("size",), "at least 1 image", lambda v: v is None or v >= 1),
            (("validation",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("largest_drop",), "in [0, 1]", lambda v: 0 <= v <= 1),
        )


@dataclass(frozen=True)
class Experiment:
    """One experiment: an attack and optionally a defense on a data set, with a model and a seed."""

    attack: str
    """Name in bdjax.attacks, or the path of a .py file."""
    defense: str | None = None
    """Name in bdjax.defenses, or the path of a .py file; None: only train the victim."""
    dataset: str = "digits"
    """digits, npz:PATH, folder:PATH or tfds:NAME."""
    model: str = "cnn"
    """Name in bdjax.models."""
    seed: int = 0
    """Seed of all random numbers."""
    attack_config: Any = None
    """Config of the attack; None: its defaults."""
    defense_config: Any = None
    """Config of the defense; None: its defaults."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Training recipe of the victim."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """The defender's clean images."""

    def __post_init__(self) -> None:
        if self.attack_config is None:
            object.__setattr__(self, "attack_config", config_of("attacks", self.attack)())
        if self.defense is not None and self.defense_config is None:
            object.__setattr__(self, "defense_config", config_of("defenses", self.defense)())


def demo(seed: int = 0) -> Experiment:
    """Return the experiment of `bdjax demo`: BadNets on handwritten digits, purified by I-BAU."""
    return Experiment("badnets", "ibau", seed=seed, fit=FitConfig(epochs=15))


def config_of(kind: str, name: str) -> type:
    """Return the Config class of a method. Raises InputError for an unknown name."""
    config: type = registry.load(kind, name).Config
    return config


def attack_record(experiment: Experiment, fingerprint: str) -> dict[str, Any]:
    """Return the JSON record that determines the victim; files are represented by their hashes."""
    attack, config = experiment.attack, experiment.attack_config
    record = {"name": attack, "source": _source(attack), **_config_record(config)}
    spec = registry.load("attacks", attack)
    if spec.parts is not None:  # for the files that they name
        record["parts"] = [
            {"source": _source(part.attack), **_config_record(part.config)} for part in spec.parts(config)
        ]
    return {
        "attack": record,
        "dataset": fingerprint,
        "model": experiment.model,
        "seed": experiment.seed,
        "fit": to_json(experiment.fit),
    }


def run_record(experiment: Experiment, victim_hash: str) -> dict[str, Any]:
    """Return the JSON record that determines a run's results: victim, defense, split and the defense's seed."""
    defense = experiment.defense or ""
    return {
        "victim": victim_hash,
        "defense": {"name": defense, "source": _source(defense), **_config_record(experiment.defense_config)},
        "split": to_json(experiment.split),
        "seed": experiment.seed,
    }


def stage_key(seed: int, stage: Literal["attack", "defense", "split", "evaluate"]) -> jax.Array:
    """Return the random key of one stage of a run; stages do not share random numbers."""
    number = ("attack", "defense", "split", "evaluate").index(stage)
    return jax.random.fold_in(jax.random.key(seed), number)


def digest(record: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a record: sorted keys, no spaces, shortest floats."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def to_json(config: Any) -> dict[str, Any]:
    """Convert a Config to JSON values."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def from_json(kind: type, values: dict[str, Any], where: str = "the record") -> Any:
    """Build a Config from the result of :func:`to_json`.

    Args:
      kind: the Config class.
      values: values of its fields.
      where: name of the record, for messages.

    Returns:
      The Config.

    Raises:
      InputError: when the class has no such field or rejects a value.
    """
    return records.from_plain(kind, values, where)


def _config_record(config: Any) -> dict[str, Any]:
    """Return a Config as JSON values, with hashes in place of paths of files."""
    values = to_json(config)
    hints = typing.get_type_hints(type(config))
    for name, value in values.items():
        if value and (hints[name] is ArrayFile or str(value).endswith(".py")):  # a picture, a user-defined solver
            values[name] = _file_hash(value)
    return {"config": values}


def _source(name: str) -> str | None:
    """Return the hash of a user-defined method's file, or None."""
    return _file_hash(name) if name.endswith(".py") else None


def _file_hash(path: str) -> str:
    return sha256(Path(path))
