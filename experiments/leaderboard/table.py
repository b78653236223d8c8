"""All defenses with their defaults on given victims, under one protocol: the rows of a leaderboard.

    bdjax sweep experiments/leaderboard/table.py --victims victims.json --sizes 500 --measured 2000 --seeds 0,1,2
    bdjax leaderboard runs/leaderboard/table --out leaderboard

Measures ACC, ASR, DER, the estimate without the trigger, seconds and memory of every defense on every victim and with
every number of clean images; with --reactivations retuning,query_reactivation also R-ASR and Q-ASR.

--victims names lists as experiments/foreign/victims.json (its docs are in bench.py there), directories of victims that
`bdjax train` wrote, or both, with commas between; weight files of a list are imported first. Only defenses that see
neither the trigger nor the poisoned training set take part, unless --defenses names others (ep, ibu). The defender's
images are a stratified part of the test split; everything is measured on the rest of it, and no setting is chosen here.
At the scale smoke a victim is trained on the digits; the scale cpu has one number of images and measures on 2,000 of
the others.

Time on 2 CPU cores: from 1 second (clp, age) to 25 minutes (sau) a cell of a small network.
To expect: on victims whose triggers are static, ASR below 10 % at a loss of at most 3 points of ACC from the better
half of the defenses (experiments/foreign/README.md); clp, bnp and fst may change nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bdjax import registry
from bdjax.config import Experiment, FitConfig, SplitConfig, config_of, from_json
from bdjax.errors import InputError
from bdjax.pipelines.experiment_options import SMOKE, Cell, ExperimentOptions
from bdjax.pipelines.stages import Reactivation
from bdjax.pipelines.victim_list import read_victims

TITLE = "Leaderboard: all defenses with their defaults"
SEEDS = (0, 1, 2)
FULL = {"victims": ("experiments/foreign/victims.json",)}


@dataclass(frozen=True)
class Options(ExperimentOptions):
    """Options of the leaderboard."""

    victims: tuple[str, ...] = ()
    """Lists of victims (.json) and directories of victims; default: experiments/foreign/victims.json."""
    defenses: tuple[str, ...] = ()
    """Defenses, with their defaults; default: all that see clean images alone."""
    sizes: tuple[int, ...] = ()
    """Numbers of the defender's clean images; default: the scale's."""
    sets: tuple[str, ...] = ()
    """Sets of victims, such as dev and test; default: all."""
    measured: int = 0
    """Held-out images to measure on, at most; default: the scale's, 0 for all."""
    reactivations: tuple[str, ...] = ()
    """Re-activation attacks on the model that each defense gives back; of victims that were trained by bdjax."""

    SCALES: ClassVar = {
        "paper": {**FULL, "sizes": (500, 2500)},
        "cpu": {**FULL, "sizes": (500,), "measured": 2000},
        "smoke": {**SMOKE, "defenses": ("clp",), "sizes": (100,), "measured": 50},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.victims and (self.dataset or self.model or self.epochs):
            raise InputError("--dataset, --model and --epochs have no effect here: each victim says its own.")


def cells(options: Options) -> list[Cell]:
    """Every victim, number of images and defense."""
    names = options.defenses or _with_clean_images_alone()
    smoke = {"name": "badnets", "set": "smoke", "attack": "badnets", "attack_config": {}}
    victims = list(read_victims(options.victims)) or [smoke]
    return [
        _cell(options, victim, size, defense)
        for victim in victims
        if not options.sets or victim["set"] in options.sets
        for size in options.sizes
        for defense in names
    ]


def _with_clean_images_alone() -> list[str]:
    """The names of the defenses that see neither the trigger, with their defaults, nor the poisoned training set."""
    specs = (registry.load("defenses", name) for name in registry.names("defenses"))
    return [spec.name for spec in specs if spec.train is None and not spec.needs_trigger(spec.Config())]


def _cell(options: Options, victim: Mapping[str, Any], size: int, defense: str) -> Cell:
    attack, stored = victim["attack"], victim.get("path")
    trained_here = stored is None or stored.is_dir()
    return Cell(
        label=f"{victim['name']}, {defense}, {size} images",
        experiment=Experiment(
            attack,
            defense,
            victim.get("dataset", options.dataset),
            victim.get("model", options.model),
            attack_config=from_json(config_of("attacks", attack), victim["attack_config"], "attack_config"),
            fit=FitConfig(epochs=options.epochs or 1),
            split=SplitConfig("test", size, "stratified"),
        ),
        scale="digits" if stored is None else "",
        stored=stored,
        stages=tuple(Reactivation(name) for name in options.reactivations) if trained_here else (),
        measured=options.measured,
        estimate=True,
        victim=victim["name"],
    )
