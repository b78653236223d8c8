"""BI-BAU, Table 6 and Figure 7: what the two constraint sets do, and what the angle does; R-ASR and Q-ASR with each.

    bdjax sweep experiments/bibau/table6.py --scale cpu --dataset npz:gtsrb.npz --seeds 1
    bdjax sweep experiments/bibau/table6.py --dataset npz:cifar10.npz --attacks BadNets --angles 0,0.2,0.4,0.6,0.8,1

Measures what table2.py does, in runs/bibau/table6/summary.md. A is the likelihood in the ascent and EWC in the descent,
B the prior and the inverse EWC; default BadNets, Refool, IAD and ISSBA, at scale cpu BadNets. --angles: Figure 7 in
place of the table, these values of xi. Other options, settings and the attacks on what was purified are those of
table2.py.

Time: as table2.py. To expect (the paper, CIFAR-10, ResNet-18, averages of 4 attacks; ACC, ASR, R-ASR, Q-ASR): Base AT
85.12, 5.32, 65.67, 32.82; + A 87.08, -, 74.62, 41.00; + B 80.82, 3.00, 6.82, 2.85; both 84.16, 1.60, 5.50, 2.07. Figure
7 is a drawing: a larger xi gives a higher ACC, a smaller one lower ASR, R-ASR and Q-ASR. At scale cpu:
experiments/results/bibau_table6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bdjax.errors import InputError
from bdjax.pipelines.experiment_options import Cell, CellResult

from ._rows import (
    CPU_AGAIN,
    PAPER_AGAIN,
    QUICKEST_AGAIN,
    ReactivatedRows,
    bibau_config,
    reactivated_cell,
    reactivation_table,
)

TITLE = "BI-BAU Table 6 and Figure 7"
SEEDS = (0, 1, 2)
ABLATION: dict[str, dict[str, Any]] = {
    "Base AT": {"constraints_a": False, "constraints_b": False},
    "Base AT + A": {"constraints_b": False},
    "Base AT + B": {"constraints_a": False},
    "BI-BAU (U)": {},
}
"""By row: changes of BI-BAU's Config."""


@dataclass(frozen=True)
class Options(ReactivatedRows):
    """Options of the table and the figure."""

    angles: tuple[float, ...] = ()
    """Values of xi for Figure 7; none: Table 6."""

    SCALES: ClassVar = {
        "paper": {**PAPER_AGAIN, "attacks": ("BadNets", "Refool", "IAD", "ISSBA"), "rows": tuple(ABLATION)},
        "cpu": {**CPU_AGAIN, "attacks": ("BadNets",), "rows": tuple(ABLATION)},
        "smoke": {**QUICKEST_AGAIN, "rows": ("Base AT + A",)},
    }


def cells(options: Options) -> list[Cell]:
    """Every data set and attack with the rows of Table 6, or with the angles of Figure 7."""
    changes = {row: ABLATION.get(row) for row in options.rows}
    if unknown := [row for row, change in changes.items() if change is None]:
        raise InputError(f"there are no rows {', '.join(unknown)}. Choose from {', '.join(ABLATION)}.")
    if options.angles:
        changes = {f"xi {angle:g}": {"angle": angle} for angle in options.angles}
    return [
        reactivated_cell(options, dataset, name, row, ("bibau", bibau_config(options, name, **(change or {}))))
        for dataset in options.sources
        for name in options.attacks
        for row, change in changes.items()
    ]


def summarise(results: Sequence[CellResult]) -> str:
    """Mean and standard deviation over seeds of every attack and row."""
    return reactivation_table(results)
