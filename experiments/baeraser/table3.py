"""BAERASER, Table III: what β/α trades accuracy for, on MNIST, CIFAR-10 and CIFAR-100 (Liu et al., INFOCOM 2022).

    bdjax sweep experiments/baeraser/table3.py --scale cpu --dataset npz:cifar10.npz --seeds 0
    bdjax report runs/baeraser/table3 --markdown

Measures ACC and ASR before and after BAERASER, by the ratio.

Options as in table1.py, whose victims of 3x3 triggers these are. Scale cpu: CIFAR-10, `cnn`, 10 epochs, BadNets. The
paper holds β at 1 and changes α; at its learning rate that is 1,000 times the ascent where β/α = 0.001. Here the larger
of the two is 1: the same objective, in steps of a size that all ratios bear.

Time: as table2.py, six cells a victim. To expect (the paper, CIFAR-10, BadNets): from β/α = 0.001 to 100 ACC goes from
77.76 to 80.47 and ASR from 2.2 (or 1.03) to 9.99. At scale cpu (one seed), ACC from 66.91 to 73.45, and from β/α = 10
on the backdoor stays: experiments/results/baeraser_table3.
"""

from dataclasses import dataclass
from typing import ClassVar

from bdjax.pipelines.experiment_options import Cell

from ._rows import CPU, DATASETS, PAPER, QUICKEST, Rows, cell_of, config, sources

TITLE = "BAERASER Table III, β/α"
SEEDS = (0, 1, 2, 3, 4)
RATIOS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Options(Rows):
    """Options of the table."""

    ratios: tuple[float, ...] = ()
    """Values of β/α; default: the scale's."""

    SOURCES: ClassVar = sources("mnist", "cifar10", "cifar100")
    SCALES: ClassVar = {
        "paper": {**PAPER, "ratios": RATIOS},
        "cpu": {**CPU, "ratios": RATIOS},
        "smoke": {**QUICKEST, "datasets": ("cifar10",), "ratios": (0.1,)},
    }


def cells(options: Options) -> list[Cell]:
    """Every data set, attack and ratio."""
    return [
        _cell(options, dataset, attack, ratio)
        for dataset in options.sources
        for attack in options.attacks
        for ratio in options.ratios
    ]


def _cell(options: Options, dataset: str, attack: str, ratio: float) -> Cell:
    settings = config("baeraser", dataset, options, alpha=min(1.0, 1 / ratio), beta=min(1.0, ratio))
    paper = {
        "table": DATASETS[dataset].ratio_part,
        "defense_setting": f"beta/alpha={ratio:g}; 5% of the test set as clean data",
    }
    return cell_of(options, dataset, attack, 3, settings, paper, label=f"β/α = {ratio:g}")
