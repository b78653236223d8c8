"""AGE, Tables 3 and 4: its score on eight triggers beside actFT (with the trigger) and basicFT (without), CIFAR-10.

    BDJAX_CIFAR10=npz:cifar10.npz bdjax sweep experiments/age_table3_4.py
    bdjax report runs/age_table3_4 --markdown

Data, MODEL, EPOCHS and SEEDS as in age_table1.py, whose victims of the white patch these are. TRIGGERS=a,c leaves out
the others. With EPOCHS below 50 the optimisation of Narcissus is cut, too.

Setting: AGE gets 512 test images, actFT and basicFT 5,000; the rest is evaluated. basicFT is `finetune` with the
victim's own recipe and as many epochs (its time in Table 6 says about so many). The paper's BAERASER and NAD are not
among these rows. Its Table 3 gives the trigger at three times its opacity to actFT alone; here whoever is given the
trigger gets it as at test time.

Time: a victim a trigger and seed and a clean model a seed, as in age_table1.py; Narcissus trains a surrogate as well.
Not run so far. To expect (the paper's scores, (a) to (h)): with the trigger AGE 91 to 95, actFT 95 to 4; without it AGE
80 to 90, but 18 on Narcissus, basicFT 31 to 69.
"""

import os
from pathlib import Path
from typing import Any

from bdjax.defenses import actft, age, finetune
from bdjax.pipelines.experiment_options import Cell
from bdjax.registry import load_file

table1: Any = load_file(Path(__file__).with_name("age_table1.py"))

TITLE = "AGE Tables 3 and 4, CIFAR-10"
SEEDS = table1.SEEDS
CUT = {"surrogate_epochs": 2, "epochs": 20} if table1.EPOCHS < 50 else {}
TRIGGERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # letter: the paper's setting, module, changes of its Config
    "a": (table1.WHITE, "rgba_patch", {"picture": "white"}),
    "b": ("trigger=(b) Mean; rho=10%; alpha=1.0; target=2", "rgba_patch", {"picture": "mean", "ratio": 0.1}),
    "c": ("trigger=(c) Apple; rho=5%; alpha=1.0; target=2", "rgba_patch", {"picture": "apple"}),
    "d": ("trigger=(d) TEST1; rho=5%; alpha=1.0; target=2", "rgba_patch", {"picture": "test1"}),
    "e": ("trigger=(e) TEST2; rho=5%; alpha=0.15; target=2", "rgba_patch", {"picture": "test2"}),
    "f": ("trigger=(f) Gaussian Noise; rho=5%; alpha=0.25; target=2", "rgba_patch", {"picture": "gaussian"}),
    "g": ("trigger=(g) Invisible; rho=50%; alpha not applicable; target=2", "lsb", {}),
    "h": ("trigger=(h) Narcissus; rho=5%; alpha=0.2; target=2", "narcissus", CUT),
}
BASIC = finetune.Config(table1.EPOCHS, 128, "adam", 1e-3, weight_decay=0.0, schedule="cosine", augment="none")
ROWS: tuple[tuple[str, str, str, Any, str, int], ...] = (  # table, the paper's name, module, Config, setting, images
    (
        "3",
        "AGE",
        "age",
        age.Config(share_of="layers", batch_norm=None, backdoor_knowledge=True),
        "BDK; 512 samples",
        512,
    ),
    ("3", "actFT", "actft", actft.Config(), "BDK; 5000 samples", 5000),
    ("4", "AGE", "age", age.Config(share_of="layers", batch_norm=None), "no BDK; 512 samples", 512),
    ("4", "basicFT", "finetune", BASIC, "no BDK; 5000 samples", 5000),
)


def _cell(letter: str, table: str, name: str, module: str, config: Any, setting: str, size: int) -> Cell:
    described, attack, changes = TRIGGERS[letter]
    return table1.cell_of(
        f"({letter}) {described.split(') ')[1].split(';')[0]}, {name}, {setting}",
        (attack, changes),
        (module, config),
        size,
        {"table": table, "attack_setting": described, "defense": name, "defense_setting": setting},
        scale=("surrogate and noise of Narcissus cut",) if letter == "h" and CUT else (),
    )


CELLS = tuple(
    _cell(letter, *row) for letter in os.environ.get("TRIGGERS", ",".join(TRIGGERS)).split(",") for row in ROWS
)
