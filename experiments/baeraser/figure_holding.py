"""BAERASER, Figure 4: ACC and ASR by how many clean images the defender holds, CIFAR-10 (Liu et al., INFOCOM 2022).

    bdjax sweep experiments/baeraser/figure_holding.py --scale cpu --dataset npz:cifar10.npz --seeds 0
    bdjax report runs/baeraser/figure_holding --markdown

Measures ACC and ASR before and after BAERASER with images of the test set, from 1 to 10 % of the number of training
images; when the sweep ends, holding.png shows them. Options as in table1.py, whose victims of 3x3 triggers these are.
Scale cpu: `cnn`, 10 epochs, BadNets. The tables' CSV has no numbers of this figure.

Time: as table2.py, seven cells a victim. To expect: less clean data, lower ACC and higher ASR; 500 images still take
most of the ASR away. At scale cpu (one seed): experiments/results/baeraser_figure_holding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bdjax.pipelines.experiment_options import Cell, CellResult

from ._rows import Cifar10, cell_of, config

TITLE = "BAERASER Figure 4, share of clean images, CIFAR-10"
SEEDS = (0, 1, 2, 3, 4)
PERCENT = (1, 2, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Options(Cifar10):
    """Options of the figure."""

    percent: tuple[int, ...] = ()
    """Clean images in percent of the number of training images; default: the scale's."""

    SCALES: ClassVar = {
        "paper": {**Cifar10.SCALES["paper"], "percent": PERCENT},
        "cpu": {**Cifar10.SCALES["cpu"], "percent": PERCENT},
        "smoke": {**Cifar10.SCALES["smoke"], "percent": (5,)},
    }


def cells(options: Options) -> list[Cell]:
    """Every attack and number of clean images."""
    settings = config("baeraser", "cifar10", options)
    return [
        cell_of(
            options,
            "cifar10",
            attack,
            3,
            settings,
            None,
            label=f"{percent} % ({500 * percent} images)",
            clean=500 * percent,
        )
        for attack in options.attacks
        for percent in options.percent
    ]


def draw(results: Sequence[CellResult], folder: Path) -> None:
    """Draw holding.png: means over seeds, ACC and ASR, by the defender's images."""
    from matplotlib import pyplot as plt

    runs = [result.result for result in results]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, rate in zip(axes, ("acc", "asr"), strict=True):
        for attack in sorted({run["attack"] for run in runs}):
            of_attack = [run for run in runs if run["attack"] == attack]
            sizes = sorted({run["n_defender"] for run in of_attack})
            for phase, style in (("before", "--"), ("after", "o-")):
                each = [[run[phase][rate] for run in of_attack if run["n_defender"] == size] for size in sizes]
                means = [100 * sum(values) / len(values) for values in each]
                axis.plot(sizes, means, style, label=f"{attack}, {phase}")
        axis.set(xlabel="clean images", ylabel=f"{rate.upper()}, %", ylim=(-2, 102))
        axis.legend(loc="center right")
    figure.savefig(folder / "holding.png", dpi=130)
    plt.close(figure)
