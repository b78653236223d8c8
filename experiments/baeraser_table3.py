"""BAERASER, Table III: what β/α trades accuracy for, on MNIST, CIFAR-10 and CIFAR-100 (Liu et al., INFOCOM 2022).

    BDJAX_CIFAR10=npz:cifar10.npz bdjax sweep experiments/baeraser_table3.py
    bdjax report runs/baeraser_table3 --markdown

Data, MODEL and EPOCHS as in baeraser_table1.py, whose victims of 3x3 triggers these are; DATASETS=CIFAR-10 takes one of
the three. The paper holds β at 1 and changes α; at its learning rate that is 1,000 times the ascent where β/α = 0.001.
Here the larger of the two is 1: the same objective, in steps of a size that all ratios bear.

To expect (the paper, CIFAR-10, BadNets): from β/α = 0.001 to 100 ACC goes from 77.76 to 80.47 and ASR from 2.2 (or
1.03) to 9.99. Here (BadNets, `cnn`, one seed), ACC from 66.91 to 73.45, and from β/α = 10 on the backdoor stays:
experiments/results/baeraser_table3.
"""

import os
from pathlib import Path
from typing import Any

from bdjax.pipelines.experiment_options import Cell
from bdjax.registry import load_file

table1: Any = load_file(Path(__file__).with_name("baeraser_table1.py"))

TITLE = "BAERASER Table III, β/α"
SEEDS = table1.SEEDS
PARTS = {"MNIST": "III(a)", "CIFAR-10": "III(b)", "CIFAR-100": "III(c)"}
DATASETS = tuple(os.environ.get("DATASETS", ",".join(PARTS)).split(","))
RATIOS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def _cell(dataset: str, attack: str, ratio: float) -> Cell:
    settings = table1.config("baeraser", dataset, alpha=min(1.0, 1 / ratio), beta=min(1.0, ratio))
    paper = {
        "table": PARTS[dataset],
        "defense_setting": f"beta/alpha={ratio:g}; 5% of the test set as clean data",
    }
    return table1.cell_of(dataset, attack, 3, "baeraser", settings, paper, label=f"β/α = {ratio:g}")


CELLS = tuple(_cell(dataset, attack, ratio) for dataset in DATASETS for attack in table1.CHOSEN for ratio in RATIOS)
