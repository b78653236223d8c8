"""Rows of AGE's tables: data sets, recipe and options that its files share (Hsieh et al., 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bdjax.config import Experiment, SplitConfig, config_of
from bdjax.engine import FitConfig
from bdjax.pipelines.experiment_options import SMOKE, Cell, SeveralDatasets

NAMES = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cinic10": "CINIC-10",
    "tiny": "Tiny-ImageNet",
}
"""The paper's name of each data set."""
SOURCES = {
    "mnist": "tfds:mnist",
    "cifar10": "tfds:cifar10",
    "cifar100": "tfds:cifar100",
    "cinic10": "folder:cinic10",
    "tiny": "folder:tiny-imagenet-200",
}
WHITE = "trigger=(a) White; rho=5%; alpha=1.0; target=2"
SCALES: Mapping[str, Mapping[str, Any]] = {
    "paper": {"model": "resnet18", "epochs": 50},
    "cpu": {"model": "cnn", "epochs": 5, "datasets": ("cifar10",)},
    "smoke": {**SMOKE, "datasets": ("cifar10",)},
}


@dataclass(frozen=True)
class Cifar10(SeveralDatasets):
    """Options of a table of CIFAR-10 alone."""

    SOURCES: ClassVar = {"cifar10": SOURCES["cifar10"]}
    SCALES: ClassVar = SCALES


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    label: str
    attack: str
    attack_changes: Mapping[str, Any]
    """Changes of the attack's Config."""
    defense: str
    defense_config: Any
    size: int
    """Images of the defender."""
    paper: Mapping[str, str]
    """Columns of the published row, besides the paper, the data set and the model."""
    scale: tuple[str, ...] = ()
    """Further remarks on how it is smaller than the paper's."""


def recipe(epochs: int) -> FitConfig:
    """The recipe of victims and clean models; the paper prints none."""
    return FitConfig(epochs, 128, "adam", 1e-3, schedule="cosine")


def cell_of(row: Row, options: SeveralDatasets, dataset: str = "cifar10") -> Cell:
    """The cell of a row.

    Args:
      row: its attack, defense and published row.
      options: model, epochs and where the data sets are.
      dataset: name in SOURCES.

    Returns:
      The cell, with a clean model for the score.
    """
    smoke = options.scale == "smoke"
    small = [f"{options.model} for ResNet-18"] * (options.model != "resnet18")
    small += [f"victim trained {options.epochs} epochs"] * (options.epochs < 50)
    return Cell(
        label=row.label,
        experiment=Experiment(
            row.attack,
            row.defense,
            options.sources[dataset],
            options.model,
            attack_config=config_of("attacks", row.attack)(**row.attack_changes),
            defense_config=row.defense_config,
            fit=recipe(options.epochs),
            split=SplitConfig(source="test", size=min(row.size, 64) if smoke else row.size, validation=0.0),
        ),
        paper={"paper": "age", "dataset": NAMES[dataset], "model": "ResNet-18", **row.paper},
        scale="; ".join([*small, *row.scale, *["digits"] * smoke]),
        clean=True,
    )
