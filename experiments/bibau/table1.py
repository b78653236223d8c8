"""BI-BAU, Tables 1 and 11: ACC and ASR on CIFAR-10 and GTSRB, targeted and untargeted, beside I-BAU.

    bdjax sweep experiments/bibau/table1.py --dataset npz:cifar10.npz
    bdjax report runs/bibau/table1 --markdown

Measures ACC and ASR before and after three defenses, for eight attacks.

Scales: paper: CIFAR-10 (--datasets gtsrb=npz:gtsrb.npz --model vgg19 takes GTSRB and no flips), ResNet-18, 200 epochs
(SGD 0.1, a tenth of it from epoch 100 and again from 150, crops and flips); cpu: GTSRB, `cnn`, 3 epochs. Fewer than 50
epochs: Adam 2e-3 along a cosine, batches of 32, no augmentation. The table marks smaller cells. --norm l2 reads the
lost letter of the bound 25.0 otherwise.

Setting: 10 % poisoned, target 0 (the clean-label ones as their modules say, target 0); 5 % of the training images are
the defender's. What of BI-BAU's constants is lost and what stands for it is in bdjax/defenses/bibau.py.

Time: with the paper's schedule hours an attack on a GPU; not run so far. To expect (the paper, averages of 8 attacks):
ACC 89.91 and ASR 99.64 before; (T) 85.57 and 4.80, (U) 85.60 and 1.41 after.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from bdjax.defenses import bibau, ibau
from bdjax.pipelines.experiment_options import Cell

from ._rows import ATTACKS, CPU, PAPER, QUICKEST, Rows, cell_of

TITLE = "BI-BAU Tables 1 (CIFAR-10) and 11 (GTSRB)"
SEEDS = (0, 1, 2)
VARIANTS = ("targeted", "untargeted")
TABLE_11 = tuple(name for name in ATTACKS if name != "Narcissus")


@dataclass(frozen=True)
class Options(Rows):
    """Options of the table."""

    variants: tuple[str, ...] = ()
    """targeted, untargeted: rows of BI-BAU beside I-BAU's; default: the scale's."""

    SCALES: ClassVar = {
        "paper": {**PAPER, "attacks": tuple(ATTACKS), "variants": VARIANTS},
        "cpu": {**CPU, "attacks": TABLE_11, "variants": VARIANTS},
        "smoke": {**QUICKEST, "attacks": ("BadNets",), "variants": ("untargeted",)},
    }


def cells(options: Options) -> list[Cell]:
    """Every data set and attack with BI-BAU (T), BI-BAU (U) and I-BAU."""
    return [cell for dataset in options.sources for name in options.attacks for cell in _cells(options, dataset, name)]


def _cells(options: Options, dataset: str, name: str) -> list[Cell]:
    preset: Any = ATTACKS[name][2]
    table = "11" if dataset == "gtsrb" else "1"
    quick: dict[str, Any] = {"epochs": 1, "batch_size": 64, "steps": 2} if options.scale == "smoke" else {}
    variants: tuple[Any, ...] = options.variants
    defenses = [
        (
            f"BI-BAU ({variant[0].upper()})",
            ("bibau", bibau.Config(procedure="paper", variant=variant, preset=preset, norm=options.norm, **quick)),
            {"table": table, "defense": "BI-BAU", "defense_setting": variant},
        )
        for variant in variants
    ]
    release: Any = ("ibau", ibau.Config(schedule="release"))
    defenses.append(("I-BAU", release, {"table": table, "defense": "I-BAU"}))
    images = 200 if options.scale == "smoke" else None
    return [cell_of(options, dataset, name, *defense, images=images) for defense in defenses]
