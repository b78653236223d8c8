"""BAERASER, Table II: ACC and ASR on CIFAR-10 and CIFAR-100 (Liu et al., INFOCOM 2022).

    BDJAX_CIFAR10=npz:cifar10.npz bdjax sweep experiments/baeraser_table2.py
    bdjax report runs/baeraser_table2 --markdown

Data: BDJAX_CIFAR10 and BDJAX_CIFAR100 name the sources (default tfds:cifar10, tfds:cifar100). MODEL, EPOCHS,
SIZES, ATTACKS, DATASETS, DEFENSES and the setting as in baeraser_table1.py. The generators of CIFAR-100 are as wide as
in MESA's release (2,048), and those of 10 labels learn at once.

To expect (averages of the nine attacks, ACC and ASR): CIFAR-10 83.92 and 99.26 before, 74.71 and 8.18 after BAERASER,
71.07 and 45.49 after fine-tuning; CIFAR-100 54.78 and 99.17 before, 48.28 and 7.68, 45.34 and 49.32 after. Here
(CIFAR-10, BadNets 3x3, `cnn`): experiments/results/baeraser_table2. Larger triggers are easier for BAERASER, harder
for the others.
"""

from pathlib import Path
from typing import Any

from bdjax.registry import load_file

table1: Any = load_file(Path(__file__).with_name("baeraser_table1.py"))

TITLE = "BAERASER Table II, CIFAR-10 and CIFAR-100"
SEEDS = table1.SEEDS
CELLS = table1.cells("CIFAR-10", "CIFAR-100")
