"""BI-BAU, Table 6: what the two constraint sets do (Base AT, + A, + B, + A + B), CIFAR-10.

    BDJAX_CIFAR10=npz:cifar10.npz bdjax sweep experiments/bibau_table6.py
    bdjax report runs/bibau_table6 --markdown
    bdjax reactivate runs/bibau_table6/HASH retuning          # R-ASR, and query_reactivation for Q-ASR, of each

A is the likelihood in the ascent and EWC in the descent, B the prior and the inverse EWC. DATA, MODEL, EPOCHS and NORM
as in bibau_table1.py, whose victims these are. ANGLES=1 adds the sweep of Figure 7, xi from 0 to 1, on BadNets.

Not run so far. To expect (the paper, averages of 4 attacks): ACC and ASR 85.12 and 5.32; A 87.08; B 80.82 and 3.00;
both 84.16 and 1.60. R-ASR and Q-ASR 65.67 and 32.82; A 74.62 and 41.00; B 6.82 and 2.85; both 5.50 and 2.07.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from bdjax.defenses import bibau
from bdjax.registry import load_file
from bdjax.sweep import Cell

table1: Any = load_file(Path(__file__).with_name("bibau_table1.py"))

TITLE = f"BI-BAU Table 6, {table1.NAME}"
SEEDS = table1.SEEDS
ROWS = {  # label: (A, B), the paper's name and setting
    "Base AT": ((False, False), "Base AT", "ablation"),
    "Base AT + A": ((True, False), "Base AT + A", "ablation"),
    "Base AT + B": ((False, True), "Base AT + B", "ablation"),
    "BI-BAU": ((True, True), "BI-BAU", "ablation: Base AT + A + B"),
}


def _cell(name: str, label: str, config: bibau.Config, paper: dict[str, str] | None) -> Cell:
    cell = table1.cell_of(name, label, "bibau", config, {})
    query = {"paper": "bibau", "table": "6", "dataset": table1.NAME, "model": "ResNet-18", "attack": name}
    return dataclasses.replace(cell, paper=query | paper if paper else None)


CELLS = tuple(
    _cell(
        name,
        label,
        bibau.Config(preset=table1.ATTACKS[name][2], constraints_a=a, constraints_b=b, norm=table1.NORM),
        {"defense": paper, "defense_setting": setting},
    )
    for name in ("BadNets", "Refool", "IAD", "ISSBA")
    for label, ((a, b), paper, setting) in ROWS.items()
)
if os.environ.get("ANGLES"):
    CELLS += tuple(
        _cell("BadNets", f"xi = {angle / 10:g}", bibau.Config(angle=angle / 10, norm=table1.NORM), None)
        for angle in range(0, 11, 2)
    )

if __name__ == "__main__":
    sys.exit(__doc__)
