"""AGE, Tables 5 and 6: how many images the edit needs, and how many seconds it takes beside the others, CIFAR-10.

    SIZES=2,16,512 BDJAX_CIFAR10=npz:cifar10.npz bdjax sweep experiments/age_table5_6.py
    bdjax report runs/age_table5_6 --markdown

Data, MODEL, EPOCHS and SEEDS as in age_table1.py, whose victims these are. SIZES keeps the rows with so many images
alone; the default is all.

The paper's seconds are of unknown hardware; ours are without compilation, on what the table says. Its BAERASER and NAD
are not among these rows, and what retraining costs is the "seconds" of the clean victims' manifests.

Time: the victims and clean models of three seeds; all rows after that together some minutes, basicFT aside. To
expect (the paper): with the trigger ASR 0 and ACC 64 to 66 whatever the size; without it ASR 25 with 2 images, below 10
from 4 on. Seconds: AGE 0.4, actFT 3 to 4, basicFT 72, retraining 424. Here (4 and 512 images):
experiments/results/age_table5_6.
"""

import os
from pathlib import Path
from typing import Any

from bdjax.defenses import actft, age
from bdjax.pipelines.experiment_options import Cell
from bdjax.registry import load_file

table3: Any = load_file(Path(__file__).with_name("age_table3_4.py"))
table1 = table3.table1

TITLE = "AGE Tables 5 and 6, CIFAR-10"
SEEDS = table1.SEEDS
ROWS: list[tuple[str, str, str, Any, str, int]] = [  # table, the paper's name, module, Config, setting, images
    (
        "5",
        "AGE",
        "age",
        age.Config(share_of="layers", batch_norm=None, backdoor_knowledge=knows),
        f"{known}; {size} samples; base",
        size,
    )
    for size in (2, 4, 8, 16, 32, 64, 128, 256, 512, 5000)
    for knows, known in ((True, "BDK"), (False, "no BDK"))
]
ROWS += [
    (
        "6",
        "AGE",
        "age",
        age.Config(share_of="layers", batch_norm=None, backdoor_knowledge=knows),
        f"{known}; {size} samples; base",
        size,
    )
    for size in (5, 50)
    for knows, known in ((True, "BDK"), (False, "no BDK"))
]
ROWS += [("6", "actFT", "actft", actft.Config(), f"BDK; {size} samples", size) for size in (500, 5000)]
ROWS += [("6", "basicFT", "finetune", table3.BASIC, f"no BDK; {size} samples", size) for size in (5, 5000)]


def _cell(table: str, name: str, module: str, config: Any, setting: str, size: int) -> Cell:
    return table1.cell_of(
        f"{name}, {setting.removesuffix('; base')}",
        ("rgba_patch", {"picture": "white"}),
        (module, config),
        size,
        {"table": table, "attack_setting": table1.WHITE, "defense": name, "defense_setting": setting},
    )


SIZES = {int(size) for size in os.environ.get("SIZES", "").split(",") if size}
CELLS = tuple(_cell(*row) for row in ROWS if not SIZES or row[-1] in SIZES)
