"""BAERASER, Figures 3 and 5: ACC and ASR along unlearning, and recovered triggers beside the true ones, CIFAR-10.

    BDJAX_CIFAR10=npz:cifar10.npz bdjax sweep experiments/baeraser_figure_curve.py
    python experiments/baeraser_figure_curve.py       # draws figure.png beside each result.json

Every run leaves the curve in result.json ("rounds", one a step) and the triggers in arrays.npz. An iteration is
one step of SGD here, with ω computed before each: the literal reading of the paper's algorithm. Data, MODEL and EPOCHS
as in baeraser_table1.py, whose victims of 3x3 triggers these are.

To expect: ASR falls first and ACC comes back ("about 8 iterations", of what the paper does not say). Here (BadNets,
`cnn`, one seed): experiments/results/baeraser_figure_curve.
"""

import json
from pathlib import Path
from typing import Any

from bdjax.io import checkpoint
from bdjax.registry import load_file
from bdjax.reports import figure

table1: Any = load_file(Path(__file__).with_name("baeraser_table1.py"))

TITLE = "BAERASER Figures 3 and 5, curves and triggers, CIFAR-10"
SEEDS = (0,)
CELLS = tuple(
    table1.cell_of(
        "CIFAR-10",
        attack,
        3,
        "baeraser",
        table1.config("baeraser", "CIFAR-10", epochs=60, steps=1),
        None,
        label="step by step",
    )
    for attack in table1.CHOSEN
)

if __name__ == "__main__":
    for found in sorted(Path("runs/baeraser_figure_curve").glob("*/result.json")):
        run = found.parent
        figure.draw(json.loads(found.read_text()), checkpoint.read_arrays(run, "arrays"), run / "figure.png")
