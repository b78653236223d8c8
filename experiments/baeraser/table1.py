"""BAERASER, Table I: ACC and ASR on MNIST and Fashion-MNIST (Liu et al., INFOCOM 2022).

    bdjax sweep experiments/baeraser/table1.py --scale cpu --dataset npz:mnist.npz --seeds 0,1,2
    bdjax report runs/baeraser/table1 --markdown

Measures ACC and ASR before and after BAERASER, and after fine-tuning with its recovered triggers.

Scales: paper: ResNet-18, 50 epochs, both data sets (--datasets mnist=npz:mnist.npz,fashion_mnist=npz:fashion.npz says
where they are); cpu: MNIST, `cnn`, 5 epochs, BadNets with triggers of 3x3. The table marks smaller cells. --defenses
baeraser leaves out the baseline, --sizes 3 the larger triggers, --attacks BadNets the others.

Setting: BadNets, TrojanNN and IMC, squares of 3, 5 and 7 pixels; the defender has 5 % as many images as there are for
training, from the test set, and the rest of it is evaluated. The paper does not say how victims are trained, the
poison ratio, the target or what a trigger shows: 10 % (BadNets: a fixed random pattern, at a random place in each
image as in the paper), trojanzoo's 1 % (TrojanNN, IMC, in a corner: a random place defeats their optimisation) and
target 0 here. "Fine-Tuning" in its tables is MESA's. Fine-Pruning and NAD are not in these files.

Time: on 2 CPU cores, `cnn` on MNIST, a victim of 5 epochs 2 minutes, a recovery 1 to 2. To expect (the paper's averages
of the nine attacks, ACC and ASR): MNIST 98.76 and 99.74 before, 98.01 and 0.87 after BAERASER, 96.96 and 39.75 after
fine-tuning; Fashion-MNIST (whose level of 99 % nobody else reaches) 99.13 and 99.72 before, 98.44 and 1.22, 96.29 and
46.19 after. At scale cpu: experiments/results/baeraser_table1.
"""

from dataclasses import dataclass
from typing import ClassVar

from bdjax.pipelines.experiment_options import Cell

from ._rows import CPU, NAMES, PAPER, QUICKEST, TableRows, sources, table_cells

TITLE = "BAERASER Table I, MNIST and Fashion-MNIST"
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Options(TableRows):
    """Options of the table."""

    SOURCES: ClassVar = sources("mnist", "fashion_mnist")
    SCALES: ClassVar = {
        "paper": {**PAPER, "sizes": (3, 5, 7), "defenses": tuple(NAMES)},
        "cpu": {**CPU, "datasets": ("mnist",), "epochs": 5, "sizes": (3,), "defenses": tuple(NAMES)},
        "smoke": {**QUICKEST, "datasets": ("mnist",), "sizes": (3,), "defenses": tuple(NAMES)},
    }


def cells(options: Options) -> list[Cell]:
    """Every data set, attack, size and defense."""
    return table_cells(options)
