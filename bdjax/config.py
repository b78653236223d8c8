"""What a run is, as data: canonical JSON, content hashes, and the same from JSON again."""

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
    """The recipe by which a model is trained."""

    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 128
    """Images a step, over all devices together; a last, smaller batch is dropped."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (default betas) or SGD with `momentum`."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """L2 term added to the gradient before momentum, as PyTorch does; biases and BN are decayed too."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Cosine to zero, or times 0.1 at 50 % and 75 % of the epochs."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "none"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; parameters and the loss stay float32."""

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
        """The dtype to create the model with."""
        return jnp.dtype(self.precision)


@dataclass(frozen=True)
class SplitConfig:
    """The defender's clean images; what it gets is never evaluated on."""

    source: Literal["test", "train", "all"] = "test"
    """The split they are drawn from: test (BAERASER, I-BAU, AGE) or train (BI-BAU, BackdoorBench; always the
    clean originals); all: both, and what is evaluated on is the rest of both."""
    size: int | None = None
    """How many; default half of the test split or of all, or 5 % of the training split."""
    order: Literal["shuffled", "given", "stratified"] = "shuffled"
    """Drawn by the seed, or the first ones in file order as in I-BAU's release; stratified: by the seed within each
    class, each in proportion, and of each class that has two on both sides."""
    validation: float = 0.2
    """Share of them that the defense does not learn from: its rounds are judged by accuracy on these. In [0, 1); 0: it
    learns from all and nothing is judged, as in the papers. So it is, too, where the share is fewer than 10 images."""
    largest_drop: float = 0.1
    """Loss of accuracy on the validation images, as a fraction in [0, 1], beyond which an earlier round is returned."""

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
    """One cell of a grid: an attack and a defense on a data set, a model and a seed."""

    attack: str
    """Name in bdjax.attacks, or the path of a .py file."""
    defense: str | None = None
    """Name in bdjax.defenses, or the path of a .py file; None: plant only."""
    dataset: str = "digits"
    """digits, npz:PATH, folder:PATH or tfds:NAME."""
    model: str = "cnn"
    """Name in bdjax.models."""
    seed: int = 0
    """Everything random follows from it."""
    attack_config: Any = None
    """The attack's Config; None: its defaults."""
    defense_config: Any = None
    """The defense's Config; None: its defaults."""
    fit: FitConfig = field(default_factory=FitConfig)
    """How the victim is trained."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """The defender's clean images."""

    def __post_init__(self) -> None:
        if self.attack_config is None:
            object.__setattr__(self, "attack_config", config_of("attacks", self.attack)())
        if self.defense is not None and self.defense_config is None:
            object.__setattr__(self, "defense_config", config_of("defenses", self.defense)())


def demo(seed: int = 0) -> Experiment:
    """What `bdjax demo` runs: BadNets on handwritten digits, cleaned by I-BAU."""
    return Experiment("badnets", "ibau", seed=seed, fit=FitConfig(epochs=15))


def config_of(kind: str, name: str) -> type:
    """The Config class of a method. Raises InputError for an unknown name."""
    return registry.load(kind, name).Config


def attack_record(experiment: Experiment, fingerprint: str) -> dict[str, Any]:
    """What decides the victim, JSON-able; paths of files stand for their content."""
    attack, config = experiment.attack, experiment.attack_config
    record = {"name": attack, "source": _source(attack), **_plain(config)}
    spec = registry.load("attacks", attack)
    if spec.parts is not None:  # for the files that they name
        record["parts"] = [{"source": _source(part.attack), **_plain(part.config)} for part in spec.parts(config)]
    return {
        "attack": record,
        "dataset": fingerprint,
        "model": experiment.model,
        "seed": experiment.seed,
        "fit": to_json(experiment.fit),
    }


def run_record(experiment: Experiment, victim_hash: str) -> dict[str, Any]:
    """What decides a run's numbers, JSON-able: the victim, the defense, the split and the defense's seed."""
    defense = experiment.defense or ""
    return {
        "victim": victim_hash,
        "defense": {"name": defense, "source": _source(defense), **_plain(experiment.defense_config)},
        "split": to_json(experiment.split),
        "seed": experiment.seed,
    }


def stage_key(seed: int, stage: Literal["attack", "defense", "split", "evaluate"]) -> jax.Array:
    """The random key of one stage of a run; stages do not share random numbers."""
    number = ("attack", "defense", "split", "evaluate").index(stage)
    return jax.random.fold_in(jax.random.key(seed), number)


def digest(record: Any) -> str:
    """sha256 of the canonical JSON of `record`: sorted keys, no spaces, shortest floats."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def to_json(config: Any) -> dict[str, Any]:
    """A Config as plain JSON values."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def from_json(kind: type, values: dict[str, Any], where: str = "the record") -> Any:
    """A Config from what :func:`to_json` gave. Raises InputError for fields that the class does not have or refuses."""
    return records.from_plain(kind, values, where)


def _plain(config: Any) -> dict[str, Any]:
    values = to_json(config)
    hints = typing.get_type_hints(type(config))
    for name, value in values.items():
        if value and (hints[name] is ArrayFile or str(value).endswith(".py")):  # a picture, a solver of one's own
            values[name] = _file_hash(value)
    return {"config": values}


def _source(name: str) -> str | None:
    return _file_hash(name) if name.endswith(".py") else None


def _file_hash(path: str) -> str:
    return sha256(Path(path))
