"""BI-BAU, Table 2: can the backdoor be reactivated? ACC, ASR, then R-ASR and Q-ASR of each purified model.

    bdjax sweep experiments/bibau/table2.py --scale cpu --dataset npz:gtsrb.npz

Measures, in runs/bibau/table2/summary.md: attacks as in table1.py (default BadNets, Blended, IAD). Each victim is
purified by BI-BAU (U) and (T), I-BAU and IBU (the idealised one), then attacked again by retuning (RA) and by queries
(QRA), and so are the victim itself ("none") and a clean model: what five poisoned images implant in *that* is the
floor, not 0.

Scales as in table1.py; cpu: BadNets and Blended, BI-BAU (U) and I-BAU, 12 epochs of BI-BAU in batches of 64 for the
paper's 20 and 256. --rows "none,BI-BAU (T)" picks rows. What has to be chosen is chosen on every fifth *training* image
in the test set's place (validation.py makes that data set), with seeds that are not reported.

Time on 2 CPU cores at scale cpu: a victim some minutes, a cell about half an hour. To expect (the paper, ResNet-18,
averages of ten attacks; ASR, R-ASR, Q-ASR): IBU 0.44, 10.04, 1.47; (T) 3.97, 16.74, 6.53; (U) 3.91, 12.48, 5.75. At
scale cpu: experiments/results/bibau_table2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bdjax.config import config_of
from bdjax.errors import InputError
from bdjax.pipelines.experiment_options import Cell, CellResult

from ._rows import (
    CPU_AGAIN,
    PAPER_AGAIN,
    QUICKEST_AGAIN,
    Defense,
    ReactivatedRows,
    bibau_config,
    reactivated_cell,
    reactivation_table,
)

TITLE = "BI-BAU Table 2"
SEEDS = (0, 1, 2)
ROWS = ("none", "I-BAU", "IBU", "BI-BAU (T)", "BI-BAU (U)")


@dataclass(frozen=True)
class Options(ReactivatedRows):
    """Options of the table."""

    SCALES: ClassVar = {
        "paper": {**PAPER_AGAIN, "attacks": ("BadNets", "Blended", "IAD"), "rows": ROWS},
        "cpu": {**CPU_AGAIN, "attacks": ("BadNets", "Blended"), "rows": ("BI-BAU (U)", "I-BAU")},
        "smoke": {**QUICKEST_AGAIN, "rows": ("none", "BI-BAU (U)")},
    }


def cells(options: Options) -> list[Cell]:
    """Every data set, attack and row."""
    if unknown := [row for row in options.rows if row not in ROWS]:
        raise InputError(f"there are no rows {', '.join(unknown)}. Choose from {', '.join(ROWS)}.")
    return [
        reactivated_cell(options, dataset, name, row, _defense(options, name, row))
        for dataset in options.sources
        for name in options.attacks
        for row in options.rows
    ]


def _defense(options: Options, name: str, row: str) -> Defense:
    defenses: dict[str, Defense] = {
        "none": None,
        "I-BAU": ("ibau", config_of("defenses", "ibau")(schedule="release", norm_bound=10.0)),  # the release's notebook
        "IBU": ("ibu", config_of("defenses", "ibu")()),
        "BI-BAU (T)": ("bibau", bibau_config(options, name, variant="targeted")),
        "BI-BAU (U)": ("bibau", bibau_config(options, name)),
    }
    return defenses[row]


def summarise(results: Sequence[CellResult]) -> str:
    """Mean and standard deviation over seeds of every attack and row."""
    return reactivation_table(results)
