"""Defenses with their defaults on models that their settings were not chosen on: ACC, ASR, drop, seconds, memory.

    bdjax sweep experiments/foreign/bench.py --victims victims.json --defenses ibau --sizes 100,500,2500 --measured 2000

Measures, in runs/foreign/bench/summary.md, every victim of a list with every defense and number of clean images, with
the estimate of the ASR without the trigger; estimate.png shows how well that follows the true ASR.

`victims.json` is a list of {"name", "set", "path", "model", "attack", "attack_config", "dataset"}: the path of a victim
directory, which says itself what its model and attack are, or of a weight file, which is imported as "model" and
measured with the attack's trigger. Paths are relative
to the file; "set" is any word, "dev" for victims that settings were chosen on. The defender's images are a stratified
part of the test split; everything is measured on the rest of it. At the scale smoke a victim is trained on the digits;
the scales paper and cpu are the same, for the victims exist already.

Time on 2 CPU cores: 9 to 430 seconds a cell. To expect: see README.md beside this file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from bdjax.config import Experiment, FitConfig, SplitConfig, config_of, from_json
from bdjax.errors import InputError
from bdjax.pipelines.experiment_options import SMOKE, Cell, CellResult, ExperimentOptions
from bdjax.pipelines.victim_list import read_victims

from ._estimate import draw

__all__ = ["SEEDS", "TITLE", "Options", "cells", "draw", "summarise"]

TITLE = "Defenses on foreign victims"
SEEDS = (0,)
FULL = {"victims": "experiments/foreign/victims.json", "defenses": ("ibau", "bibau", "auto"), "sizes": (500,)}


@dataclass(frozen=True)
class Options(ExperimentOptions):
    """Options of the bench."""

    victims: str = ""
    """File that lists the victims; default: experiments/foreign/victims.json."""
    defenses: tuple[str, ...] = ()
    """Defenses, with their defaults; default: the scale's."""
    sizes: tuple[int, ...] = ()
    """Numbers of the defender's clean images; default: the scale's."""
    sets: tuple[str, ...] = ()
    """Sets of victims, such as dev and test; default: all."""
    measured: int = 0
    """Held-out images to measure on, at most; 0: all."""

    SCALES: ClassVar = {
        "paper": FULL,
        "cpu": FULL,
        "smoke": {**SMOKE, "defenses": ("clp",), "sizes": (100,), "measured": 50},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.victims and (self.dataset or self.model or self.epochs):
            raise InputError(f"--dataset, --model and --epochs have no effect here: {self.victims} lists the victims.")


def cells(options: Options) -> list[Cell]:
    """Every victim, number of images and defense."""
    smoke = {"name": "badnets", "set": "smoke", "attack": "badnets", "attack_config": {}}
    victims = list(read_victims([options.victims])) if options.victims else [smoke]
    return [
        _cell(options, victim, size, defense)
        for victim in victims
        if not options.sets or victim["set"] in options.sets
        for size in options.sizes
        for defense in options.defenses
    ]


def _cell(options: Options, victim: Mapping[str, Any], size: int, defense: str) -> Cell:
    return Cell(
        label=f"{victim['set']}, {victim['name']}, {defense}, {size} images",
        experiment=Experiment(
            victim["attack"],
            defense,
            victim.get("dataset", options.dataset),
            victim.get("model", options.model),
            attack_config=from_json(config_of("attacks", victim["attack"]), victim["attack_config"], "attack_config"),
            fit=FitConfig(epochs=options.epochs or 1),
            split=SplitConfig("test", size, "stratified"),
        ),
        scale="digits" if options.scale == "smoke" else "",
        stored=victim.get("path"),
        measured=options.measured,
        estimate=True,
    )


def summarise(results: Sequence[CellResult]) -> str:
    """The runs, and for each set, defense and size how many victims meet the goal."""
    lines = [
        "| set | victim | defense | images | seed | ACC before, after | ASR before, after | estimate | seconds | GB "
        "| n (ACC, ASR) |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for result in sorted(results, key=lambda r: (r.cell.label.split(", ")[:2], r.result["n_defender"], r.seed)):
        run, (set_, victim, defense, _) = result.result, result.cell.label.split(", ")
        acc, asr = ((100 * run["before"][rate], 100 * run["after"][rate]) for rate in ("acc", "asr"))
        size = result.cell.experiment.split.size or 0
        groups.setdefault((set_, defense, size), []).append((asr[1], acc[0] - acc[1]))
        estimate = f"{100 * run['estimate']['rate']:.0f}" if run["estimate"] else ""
        lines.append(
            f"| {set_} | {victim} | {defense}{_remark(run)} | {size} | {result.seed} | {acc[0]:.1f}, {acc[1]:.1f} "
            f"| {asr[0]:.1f}, {asr[1]:.1f} | {estimate} | {run['seconds']['defense']:.0f} "
            f"| {(run['peak_memory_bytes'] or 0) / 1e9:.1f} | {run['n_test']}, {run['n_asr']} |"
        )
    lines += [
        "",
        "| set | defense | images | goal met | median ASR after | median loss of ACC |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (set_, defense, size), rates in sorted(groups.items()):
        highest, drop = (10, 3) if size >= 500 else (20, 5)
        met = sum(after <= highest and loss <= drop for after, loss in rates)
        medians = " | ".join(f"{median(values):.1f}" for values in zip(*rates, strict=True))
        lines.append(f"| {set_} | {defense} | {size} | {met} of {len(rates)} | {medians} |")
    lines += [
        "",
        "Goal: ASR at most 10 % and ACC at most 3 points lower; with fewer than 500 images 20 % and 5 points.",
    ]
    return "\n".join(lines) + "\n"


def _remark(run: Mapping[str, Any]) -> str:
    """Whether an earlier round was returned, or which method was chosen."""
    if any("rolled_back_to" in row for row in run["rounds"]):
        return " (rolled back)"
    chosen = next((int(row["chosen"]) for row in run["rounds"] if "chosen" in row), None)
    if chosen is None:
        return ""
    return f" ({run['defense_config']['methods'][chosen] if chosen >= 0 else 'none'})"
