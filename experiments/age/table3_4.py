"""AGE, Tables 3 and 4: its score on eight triggers beside actFT (with the trigger) and basicFT (without), CIFAR-10.

    bdjax sweep experiments/age/table3_4.py --scale cpu --dataset npz:cifar10.npz --triggers a,c
    bdjax report runs/age/table3_4 --markdown

Measures ACC, ASR, CTCA and the score of three defenses on each trigger.

Scales as in table1.py, whose victims of the white patch these are. --triggers a,c leaves out the others. With --epochs
below 50 the optimisation of Narcissus is cut, too.

Setting: AGE gets 512 test images, actFT and basicFT 5,000; the rest is evaluated. basicFT is `finetune` with the
victim's own recipe and as many epochs (its time in Table 6 says about so many). The paper's BAERASER and NAD are not
among these rows. Its Table 3 gives the trigger at three times its opacity to actFT alone; here whoever is given the
trigger gets it as at test time.

Time: a victim a trigger and seed and a clean model a seed, as in table1.py; Narcissus trains a surrogate as well.
Not run so far. To expect (the paper's scores, (a) to (h)): with the trigger AGE 91 to 95, actFT 95 to 4; without it AGE
80 to 90, but 18 on Narcissus, basicFT 31 to 69.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from bdjax.defenses import actft, age
from bdjax.pipelines.experiment_options import Cell

from ._fine_tuning import basic
from ._rows import SCALES, WHITE, Cifar10, Row, cell_of

TITLE = "AGE Tables 3 and 4, CIFAR-10"
SEEDS = (0, 1, 2)
TRIGGERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a": (WHITE, "rgba_patch", {"picture": "white"}),
    "b": ("trigger=(b) Mean; rho=10%; alpha=1.0; target=2", "rgba_patch", {"picture": "mean", "ratio": 0.1}),
    "c": ("trigger=(c) Apple; rho=5%; alpha=1.0; target=2", "rgba_patch", {"picture": "apple"}),
    "d": ("trigger=(d) TEST1; rho=5%; alpha=1.0; target=2", "rgba_patch", {"picture": "test1"}),
    "e": ("trigger=(e) TEST2; rho=5%; alpha=0.15; target=2", "rgba_patch", {"picture": "test2"}),
    "f": ("trigger=(f) Gaussian Noise; rho=5%; alpha=0.25; target=2", "rgba_patch", {"picture": "gaussian"}),
    "g": ("trigger=(g) Invisible; rho=50%; alpha not applicable; target=2", "lsb", {}),
    "h": ("trigger=(h) Narcissus; rho=5%; alpha=0.2; target=2", "narcissus", {}),
}
"""By letter: the paper's setting, the module, changes of its Config."""
CUT = {"surrogate_epochs": 2, "epochs": 20}
"""Changes of Narcissus's Config for fewer than 50 epochs."""


@dataclass(frozen=True)
class Options(Cifar10):
    """Options of the tables."""

    triggers: tuple[str, ...] = ()
    """Letters of the triggers; default: the scale's."""

    SCALES: ClassVar = {
        "paper": {**SCALES["paper"], "triggers": tuple(TRIGGERS)},
        "cpu": {**SCALES["cpu"], "triggers": tuple(TRIGGERS)},
        "smoke": {**SCALES["smoke"], "triggers": ("c",)},
    }


def cells(options: Options) -> list[Cell]:
    """Every trigger with AGE, actFT and basicFT."""
    layers: dict[str, Any] = {"share_of": "layers", "batch_norm": None}
    defenses: tuple[tuple[str, str, str, Any, str, int], ...] = (
        ("3", "AGE", "age", age.Config(**layers, backdoor_knowledge=True), "BDK; 512 samples", 512),
        ("3", "actFT", "actft", actft.Config(), "BDK; 5000 samples", 5000),
        ("4", "AGE", "age", age.Config(**layers), "no BDK; 512 samples", 512),
        ("4", "basicFT", "finetune", basic(options.epochs), "no BDK; 5000 samples", 5000),
    )
    return [_cell(options, letter, *defense) for letter in options.triggers for defense in defenses]


def _cell(
    options: Options, letter: str, table: str, name: str, module: str, config: Any, setting: str, size: int
) -> Cell:
    described, attack, changes = TRIGGERS[letter]
    is_cut = letter == "h" and options.epochs < 50
    row = Row(
        f"({letter}) {described.split(') ')[1].split(';')[0]}, {name}, {setting}",
        attack,
        {**changes, **(CUT if is_cut else {})},
        module,
        config,
        size,
        {"table": table, "attack_setting": described, "defense": name, "defense_setting": setting},
        ("surrogate and noise of Narcissus cut",) if is_cut else (),
    )
    return cell_of(row, options)
