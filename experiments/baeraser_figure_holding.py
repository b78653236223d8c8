"""BAERASER, Figure 4: ACC and ASR by how many clean images the defender holds, CIFAR-10 (Liu et al., INFOCOM 2022).

    BDJAX_CIFAR10=npz:cifar10.npz bdjax sweep experiments/baeraser_figure_holding.py
    bdjax report runs/baeraser_figure_holding --markdown
    python experiments/baeraser_figure_holding.py holding.png

From 1 to 10 % of the number of training images, drawn from the test set. Data, MODEL and EPOCHS as in
baeraser_table1.py, whose victims of 3x3 triggers these are. The tables' CSV has no numbers of this figure.

To expect: less clean data, lower ACC and higher ASR; 500 images still take most of the ASR away. Here (BadNets, `cnn`,
one seed): experiments/results/baeraser_figure_holding.
"""

import json
import sys
from pathlib import Path
from typing import Any

from bdjax.registry import load_file

table1: Any = load_file(Path(__file__).with_name("baeraser_table1.py"))

TITLE = "BAERASER Figure 4, share of clean images, CIFAR-10"
SEEDS = table1.SEEDS
PERCENT = (1, 2, 4, 5, 6, 8, 10)
CELLS = tuple(
    table1.cell_of(
        "CIFAR-10",
        attack,
        3,
        "baeraser",
        table1.config("baeraser", "CIFAR-10"),
        None,
        label=f"{percent} % ({500 * percent} images)",
        clean=500 * percent,
    )
    for attack in table1.CHOSEN
    for percent in PERCENT
)


def draw(runs: Path, path: Path) -> None:
    """A picture of the finished runs below `runs`: means over seeds, ACC and ASR after, by the defender's images."""
    from matplotlib import pyplot as plt

    results = [json.loads(found.read_text()) for found in sorted(runs.glob("*/result.json"))]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, rate in zip(axes, ("acc", "asr"), strict=True):
        for attack in sorted({result["attack"] for result in results}):
            own = [result for result in results if result["attack"] == attack]
            sizes = sorted({result["n_defender"] for result in own})
            for when, style in (("before", "--"), ("after", "o-")):
                each = [[result[when][rate] for result in own if result["n_defender"] == size] for size in sizes]
                means = [100 * sum(values) / len(values) for values in each]
                axis.plot(sizes, means, style, label=f"{attack}, {when}")
        axis.set(xlabel="clean images", ylabel=f"{rate.upper()}, %", ylim=(-2, 102))
        axis.legend(loc="center right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path("runs/baeraser_figure_holding"), Path(sys.argv[1]))
