"""BAERASER, Figures 3 and 5: ACC and ASR along unlearning, and recovered triggers beside the true ones, CIFAR-10.

    bdjax sweep experiments/baeraser/figure_curve.py --scale cpu --dataset npz:cifar10.npz

Every run leaves the curve in result.json ("rounds", one a step) and the triggers in arrays.npz; when the sweep ends,
figure.png beside each result.json shows both. An iteration is one step of SGD here, with ω computed before each: the
literal reading of the paper's algorithm (Liu et al., INFOCOM 2022). Options as in table1.py, whose victims of 3x3
triggers these are. Scale cpu: `cnn`, 10 epochs, BadNets.

Time: as table2.py. To expect: ASR falls first and ACC comes back ("about 8 iterations", of what the paper does not
say). At scale cpu (one seed): experiments/results/baeraser_figure_curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bdjax.io import checkpoint
from bdjax.pipelines.experiment_options import Cell, CellResult
from bdjax.reports import figure

from ._rows import Cifar10, cell_of, config

TITLE = "BAERASER Figures 3 and 5, curves and triggers, CIFAR-10"
SEEDS = (0,)


@dataclass(frozen=True)
class Options(Cifar10):
    """Options of the figures."""


def cells(options: Options) -> list[Cell]:
    """Every attack, unlearned step by step."""
    settings = config("baeraser", "cifar10", options, epochs=60, steps=1)
    return [cell_of(options, "cifar10", attack, 3, settings, None, label="step by step") for attack in options.attacks]


def draw(results: Sequence[CellResult], folder: Path) -> None:
    """Draw figure.png beside each result.json."""
    for result in results:
        arrays = checkpoint.read_arrays(result.directory, "arrays")
        figure.draw(dict(result.result), arrays, result.directory / "figure.png")
