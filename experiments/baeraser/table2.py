"""BAERASER, Table II: ACC and ASR on CIFAR-10 and CIFAR-100 (Liu et al., INFOCOM 2022).

    bdjax sweep experiments/baeraser/table2.py --scale cpu --dataset npz:cifar10.npz
    bdjax report runs/baeraser/table2 --markdown

Measures ACC and ASR before and after BAERASER, and after fine-tuning with its recovered triggers.

Options and setting as in table1.py. Scale cpu: CIFAR-10, `cnn`, 10 epochs, BadNets with triggers of 3x3, BAERASER
alone. The generators of CIFAR-100 are as wide as in MESA's release (2,048), and those of 10 labels learn at once.

Time: on 2 CPU cores, `cnn` on CIFAR-10, some minutes a cell. To expect (averages of the nine attacks, ACC and ASR):
CIFAR-10 83.92 and 99.26 before, 74.71 and 8.18 after BAERASER, 71.07 and 45.49 after fine-tuning; CIFAR-100 54.78 and
99.17 before, 48.28 and 7.68, 45.34 and 49.32 after. At scale cpu: experiments/results/baeraser_table2. Larger triggers
are easier for BAERASER, harder for the others.
"""

from dataclasses import dataclass
from typing import ClassVar

from bdjax.pipelines.experiment_options import Cell

from ._rows import CPU, NAMES, PAPER, QUICKEST, TableRows, sources, table_cells

TITLE = "BAERASER Table II, CIFAR-10 and CIFAR-100"
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Options(TableRows):
    """Options of the table."""

    SOURCES: ClassVar = sources("cifar10", "cifar100")
    SCALES: ClassVar = {
        "paper": {**PAPER, "sizes": (3, 5, 7), "defenses": tuple(NAMES)},
        "cpu": {**CPU, "sizes": (3,), "defenses": ("baeraser",)},
        "smoke": {**QUICKEST, "datasets": ("cifar10",), "sizes": (3,), "defenses": ("baeraser",)},
    }


def cells(options: Options) -> list[Cell]:
    """Every data set, attack, size and defense."""
    return table_cells(options)
