"""BAERASER, Table I: ACC and ASR on MNIST and Fashion-MNIST (Liu et al., INFOCOM 2022).

    bdjax sweep experiments/baeraser_table1.py
    bdjax report runs/baeraser_table1 --markdown

Data: BDJAX_MNIST and BDJAX_FASHION_MNIST name the sources (default tfds:mnist, tfds:fashion_mnist); DATASETS=MNIST
leaves out the other. MODEL=small_vgg and EPOCHS=n make it smaller than a ResNet-18 and 50 epochs; the table then marks
the cells. DEFENSES=baeraser leaves out the baseline, SIZES=3 the larger triggers, ATTACKS=BadNets the others.

Setting: BadNets, TrojanNN and IMC, squares of 3, 5 and 7 pixels; the defender has 5 % as many images as there are for
training, from the test set, and the rest of it is evaluated. The paper does not say how victims are trained, the
poison ratio, the target or what a trigger shows: 10 % (BadNets: a fixed random pattern, at a random place in each
image as in the paper), trojanzoo's 1 % (TrojanNN, IMC, in a corner: a random place defeats their optimisation) and
target 0 here. "Fine-Tuning" in its tables is MESA's. Fine-Pruning and NAD are not in these files.

Time: on 2 CPU cores, `cnn` on MNIST, a victim of 5 epochs 2 minutes, a recovery 1 to 2. What came out stands in
experiments/results/baeraser_table1. To expect (the paper's averages of the nine attacks, ACC and ASR): MNIST 98.76 and
99.74 before, 98.01 and 0.87 after BAERASER, 96.96 and 39.75 after fine-tuning; Fashion-MNIST (whose level of 99 %
nobody else reaches) 99.13 and 99.72 before, 98.44 and 1.22, 96.29 and 46.19 after.
"""

import os
from typing import Any

from bdjax.config import Experiment, SplitConfig, config_of
from bdjax.defenses import baeraser, mesa_finetune
from bdjax.engine import FitConfig
from bdjax.pipelines.experiment_options import Cell

EPOCHS = int(os.environ.get("EPOCHS", "50"))
MODEL = os.environ.get("MODEL", "resnet18")
SIZES = tuple(int(size) for size in os.environ.get("SIZES", "3,5,7").split(","))
DEFENSES = tuple(os.environ.get("DEFENSES", "baeraser,mesa_finetune").split(","))

TITLE = "BAERASER Table I, MNIST and Fashion-MNIST"
SEEDS = (0, 1, 2, 3, 4)
DATA: dict[
    str, tuple[str, str, str, int, str]
] = {  # part of the table, variable, source, defender's images, augmentation
    "MNIST": ("I(a)", "BDJAX_MNIST", "tfds:mnist", 3000, "none"),
    "Fashion-MNIST": ("I(b)", "BDJAX_FASHION_MNIST", "tfds:fashion_mnist", 3000, "none"),
    "CIFAR-10": ("II(a)", "BDJAX_CIFAR10", "tfds:cifar10", 2500, "crop_flip"),
    "CIFAR-100": ("II(b)", "BDJAX_CIFAR100", "tfds:cifar100", 2500, "crop_flip"),
}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {  # the paper's name: module, changes of its Config
    "BadNets": ("badnets", {"margin": 0, "position": "random", "pattern": 0, "ratio": 0.1, "target": 0}),
    "TrojanNN": ("trojannn", {}),
    "IMC": ("imc", {}),
}
CHOSEN = tuple(os.environ.get("ATTACKS", ",".join(ATTACKS)).split(","))
NAMES = {"baeraser": "BAERASER", "mesa_finetune": "Fine-Tuning"}
SETTINGS = {
    "baeraser": "5% of the test set as clean data",
    "mesa_finetune": "trigger recovery + fine-tuning; 5% of the test set as clean data",
}
RECOVERY: dict[str, dict[str, Any]] = {"CIFAR-100": {"hidden": 2048, "together": 10}}  # 10 of 100 labels fill a GPU


def config(defense: str, dataset: str, **changes: Any) -> Any:
    """The defense's Config for a data set."""
    kinds: dict[str, Any] = {"baeraser": baeraser.Config, "mesa_finetune": mesa_finetune.Config}
    return kinds[defense](**RECOVERY.get(dataset, {}), **changes)


def cell_of(
    dataset: str,
    attack: str,
    size: int,
    defense: str,
    settings: Any,
    paper: dict[str, str] | None,
    *,
    label: str = "",
    clean: int | None = None,
) -> Cell:
    """A row: `paper` is added to the query of the published one (None: there is none); `clean`: defender's images."""
    part, variable, source, images, augment = DATA[dataset]
    module, changes = ATTACKS[attack]
    small = [f"{MODEL} for ResNet-18"] * (MODEL != "resnet18") + [f"{EPOCHS} of 50 epochs"] * (EPOCHS != 50)
    recipe: Any = {"schedule": "cosine", "augment": augment}
    query = {"paper": "baeraser", "table": part, "dataset": dataset, "attack": attack, "defense": NAMES[defense]}
    return Cell(
        label=f"{dataset}, {attack} {size}x{size}, {label or NAMES[defense]}",
        experiment=Experiment(
            module,
            defense,
            os.environ.get(variable, source),
            MODEL,
            attack_config=config_of("attacks", module)(size=size, **changes),
            defense_config=settings,
            fit=FitConfig(EPOCHS, 128, "sgd", 0.1, 0.9, 5e-4, **recipe),
            split=SplitConfig(source="test", size=clean or images, validation=0.0),
        ),
        paper=None if paper is None else {**query, **paper},
        scale="; ".join(small),
    )


def cells_of(dataset: str) -> tuple[Cell, ...]:
    """All rows of a data set."""
    return tuple(
        cell_of(
            dataset,
            attack,
            size,
            defense,
            config(defense, dataset),
            {"attack_setting": f"trigger {size}x{size}", "defense_setting": SETTINGS[defense]},
        )
        for attack in CHOSEN
        for size in SIZES
        for defense in DEFENSES
    )


def cells(*datasets: str) -> tuple[Cell, ...]:
    """All rows of those of `datasets` that DATASETS names (default all)."""
    wanted = os.environ.get("DATASETS", ",".join(datasets)).split(",")
    return tuple(cell for dataset in datasets if dataset in wanted for cell in cells_of(dataset))


CELLS = cells("MNIST", "Fashion-MNIST")
