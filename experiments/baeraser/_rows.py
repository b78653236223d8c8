"""Rows of BAERASER's tables and figures: data sets, attacks and recipe that its files share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from bdjax.config import Experiment, SplitConfig, config_of
from bdjax.defenses import baeraser, mesa_finetune
from bdjax.engine import FitConfig
from bdjax.pipelines.experiment_options import SMOKE, Cell, SeveralDatasets


class Dataset(NamedTuple):
    """A data set of the paper."""

    name: str
    """As the paper prints it."""
    source: str
    part: str
    """Of Tables I and II."""
    ratio_part: str
    """Of Table III; "" where it has none."""
    images: int
    """The defender's, 5 % of the number of training images."""
    augment: Any
    """Of the victim's training."""
    recovery: Mapping[str, Any] = {}
    """Changes of the recovery's Config."""


DATASETS = {
    "mnist": Dataset("MNIST", "tfds:mnist", "I(a)", "III(a)", 3000, "none"),
    "fashion_mnist": Dataset("Fashion-MNIST", "tfds:fashion_mnist", "I(b)", "", 3000, "none"),
    "cifar10": Dataset("CIFAR-10", "tfds:cifar10", "II(a)", "III(b)", 2500, "crop_flip"),
    "cifar100": Dataset(  # the generators are as wide as in MESA's release; 10 of 100 labels fill a GPU
        "CIFAR-100", "tfds:cifar100", "II(b)", "III(c)", 2500, "crop_flip", {"hidden": 2048, "together": 10}
    ),
}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "BadNets": ("badnets", {"margin": 0, "position": "random", "pattern": 0, "ratio": 0.1, "target": 0}),
    "TrojanNN": ("trojannn", {}),
    "IMC": ("imc", {}),
}
"""The paper's name: module, changes of its Config."""
NAMES = {"baeraser": "BAERASER", "mesa_finetune": "Fine-Tuning"}
SETTINGS = {
    "baeraser": "5% of the test set as clean data",
    "mesa_finetune": "trigger recovery + fine-tuning; 5% of the test set as clean data",
}
QUICK = {"hidden": 8, "noise_size": 8, "iterations": 2, "samples": 2, "batch_size": 8, "epochs": 2}
"""Changes of a defense's Config at the scale smoke."""
PAPER = {"model": "resnet18", "epochs": 50, "attacks": tuple(ATTACKS)}
CPU = {"model": "cnn", "epochs": 10, "attacks": ("BadNets",), "datasets": ("cifar10",)}
QUICKEST = {**SMOKE, "attacks": ("BadNets",)}


def sources(*names: str) -> dict[str, str]:
    """The usual sources of some data sets."""
    return {name: DATASETS[name].source for name in names}


@dataclass(frozen=True)
class Rows(SeveralDatasets):
    """Options of a table or figure."""

    attacks: tuple[str, ...] = ()
    """BadNets, TrojanNN, IMC; default: the scale's."""


@dataclass(frozen=True)
class TableRows(Rows):
    """Options of Tables I and II."""

    sizes: tuple[int, ...] = ()
    """Sides of the triggers in pixels; default: the scale's."""
    defenses: tuple[str, ...] = ()
    """baeraser, mesa_finetune; default: the scale's."""


@dataclass(frozen=True)
class Cifar10(Rows):
    """Options of a figure of CIFAR-10 with triggers of 3x3."""

    SOURCES: ClassVar = sources("cifar10")
    SCALES: ClassVar = {"paper": PAPER, "cpu": CPU, "smoke": {**QUICKEST, "datasets": ("cifar10",)}}


def config(defense: str, dataset: str, options: Rows, **changes: Any) -> Any:
    """The defense's Config for a data set.

    Args:
      defense: baeraser or mesa_finetune.
      dataset: name in DATASETS.
      options: of which the scale counts.
      **changes: of its fields.

    Returns:
      The Config.
    """
    kinds: dict[str, Any] = {"baeraser": baeraser.Config, "mesa_finetune": mesa_finetune.Config}
    quick = QUICK if options.scale == "smoke" else {}
    return kinds[defense](**{**DATASETS[dataset].recovery, **changes, **quick})


def cell_of(
    options: Rows,
    dataset: str,
    attack: str,
    size: int,
    settings: Any,
    paper: Mapping[str, str] | None,
    *,
    defense: str = "baeraser",
    label: str = "",
    clean: int | None = None,
) -> Cell:
    """A row.

    Args:
      options: model, epochs and where the data sets are.
      dataset: name in DATASETS.
      attack: name in ATTACKS.
      size: side of the trigger in pixels.
      settings: Config of the defense.
      paper: columns of the published row besides those of data set, attack and defense; None: there is none.
      defense: baeraser or mesa_finetune.
      label: what the row says of the defense; default: its name.
      clean: the defender's images; default: the data set's.

    Returns:
      The cell.
    """
    facts = DATASETS[dataset]
    module, changes = ATTACKS[attack]
    small = [f"{options.model} for ResNet-18"] * (options.model != "resnet18")
    small += [f"{options.epochs} of 50 epochs"] * (options.epochs != 50)
    images = clean or facts.images
    if options.scale == "smoke":
        small, images = [*small, "digits"], 100
    query = {
        "paper": "baeraser",
        "table": facts.part,
        "dataset": facts.name,
        "attack": attack,
        "defense": NAMES[defense],
    }
    return Cell(
        label=f"{facts.name}, {attack} {size}x{size}, {label or NAMES[defense]}",
        experiment=Experiment(
            module,
            defense,
            options.sources[dataset],
            options.model,
            attack_config=config_of("attacks", module)(size=size, **changes),
            defense_config=settings,
            fit=FitConfig(options.epochs, 128, "sgd", 0.1, 0.9, 5e-4, schedule="cosine", augment=facts.augment),
            split=SplitConfig(source="test", size=images, validation=0.0),
        ),
        paper=None if paper is None else {**query, **paper},
        scale="; ".join(small),
    )


def table_cells(options: TableRows) -> list[Cell]:
    """All rows of Table I or II."""
    return [
        cell_of(
            options,
            dataset,
            attack,
            size,
            config(defense, dataset, options),
            {"attack_setting": f"trigger {size}x{size}", "defense_setting": SETTINGS[defense]},
            defense=defense,
        )
        for dataset in options.sources
        for attack in options.attacks
        for size in options.sizes
        for defense in options.defenses
    ]
