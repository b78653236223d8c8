"""AGE, Tables 5 and 6: how many images the edit needs, and how many seconds it takes beside the others, CIFAR-10.

    bdjax sweep experiments/age/table5_6.py --scale cpu --dataset npz:cifar10.npz --sizes 4,512
    bdjax report runs/age/table5_6 --markdown

Measures ACC, ASR, CTCA, the score and seconds by the number of the defender's images.

Scales as in table1.py, whose victims these are. --sizes keeps the rows with so many images alone; the default is all.

The paper's seconds are of unknown hardware; ours are without compilation, on what the table says. Its BAERASER and NAD
are not among these rows, and what retraining costs is the "seconds" of the clean victims' manifests.

Time: the victims and clean models of three seeds; all rows after that together some minutes, basicFT aside.
To expect (the paper): with the trigger ASR 0 and ACC 64 to 66 whatever the size; without it ASR 25 with 2 images, below
10 from 4 on. Seconds: AGE 0.4, actFT 3 to 4, basicFT 72, retraining 424. Here (4 and 512 images):
experiments/results/age_table5_6.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from bdjax.defenses import actft, age
from bdjax.pipelines.experiment_options import Cell

from ._fine_tuning import basic
from ._rows import SCALES, WHITE, Cifar10, Row, cell_of

TITLE = "AGE Tables 5 and 6, CIFAR-10"
SEEDS = (0, 1, 2)
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 5000)


@dataclass(frozen=True)
class Options(Cifar10):
    """Options of the tables."""

    sizes: tuple[int, ...] = ()
    """Numbers of the defender's images whose rows are run; default (none given): all, at the scale smoke 4."""

    SCALES: ClassVar = {**SCALES, "smoke": {**SCALES["smoke"], "sizes": (4,)}}


def cells(options: Options) -> list[Cell]:
    """The rows of both tables with the sizes that are asked for."""
    rows = [_edit("5", size, knows) for size in SIZES for knows in (True, False)]
    rows += [_edit("6", size, knows) for size in (5, 50) for knows in (True, False)]
    rows += [_row("6", "actFT", "actft", actft.Config(), f"BDK; {size} samples", size) for size in (500, 5000)]
    tuned = basic(options.epochs)
    rows += [_row("6", "basicFT", "finetune", tuned, f"no BDK; {size} samples", size) for size in (5, 5000)]
    return [cell_of(row, options) for row in rows if not options.sizes or row.size in options.sizes]


def _edit(table: str, size: int, knows: bool) -> Row:
    config = age.Config(share_of="layers", batch_norm=None, backdoor_knowledge=knows)
    return _row(table, "AGE", "age", config, f"{'BDK' if knows else 'no BDK'}; {size} samples; base", size)


def _row(table: str, name: str, module: str, config: Any, setting: str, size: int) -> Row:
    return Row(
        f"{name}, {setting.removesuffix('; base')}",
        "rgba_patch",
        {"picture": "white"},
        module,
        config,
        size,
        {"table": table, "attack_setting": WHITE, "defense": name, "defense_setting": setting},
    )
