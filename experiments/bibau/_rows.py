"""Rows of BI-BAU's tables: attacks, recipe, re-activation and their table, which its files share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from bdjax.attacks import query_reactivation, retuning
from bdjax.config import Experiment, SplitConfig, config_of
from bdjax.defenses import bibau
from bdjax.engine import FitConfig
from bdjax.pipelines.experiment_options import SMOKE, Cell, CellResult, SeveralDatasets
from bdjax.pipelines.stages import Reactivation

NAMES = {"cifar10": "CIFAR-10", "gtsrb": "GTSRB"}
DIRTY = {"ratio": 0.1, "target": 0, "exclude_target": False}
ATTACKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "BadNets": ("badnets", {"size": 3, "margin": 0, **DIRTY}, "general"),
    "Blended": ("blended", {"form": "convex", **DIRTY}, "general"),
    "WaNet": ("wanet", {}, "general"),
    "Refool": ("refool", DIRTY, "refool"),
    "IAD": ("iad", {}, "general"),
    "ISSBA": ("issba", {}, "general"),
    "SIG": ("sig", {}, "low_orthogonality"),
    "Narcissus": ("narcissus", {"target": 0}, "low_orthogonality"),
}
"""The paper's name: module, changes of its Config, preset of BI-BAU."""
RETUNING = {"BadNets": 5, "WaNet": 5, "IAD": 5, "ISSBA": 5, "Blended": 1}
"""Poisoned images of the retuning attack; others: 5 on GTSRB, 2 on CIFAR-10."""
PAPER = {"model": "resnet18", "epochs": 200, "datasets": ("cifar10",)}
CPU = {"model": "cnn", "epochs": 3, "datasets": ("gtsrb",)}
QUICKEST = {**SMOKE, "datasets": ("cifar10",)}
Defense = tuple[str, Any] | None
"""Module and Config; None: the victim itself."""


@dataclass(frozen=True)
class Rows(SeveralDatasets):
    """Options of a table."""

    attacks: tuple[str, ...] = ()
    """The paper's names of the attacks; default: the scale's."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the bound 25.0, whose letter the paper's text has lost."""

    SOURCES: ClassVar = {"cifar10": "tfds:cifar10", "gtsrb": "tfds:gtsrb"}


@dataclass(frozen=True)
class ReactivatedRows(Rows):
    """Options of a table whose models are attacked again."""

    unlearn: int = 0
    """Epochs of BI-BAU; default (0): the scale's, 20 in the paper."""
    batch: int = 0
    """Images in a step of BI-BAU; default (0): the scale's, 256 in the paper."""
    images: int = 0
    """Clean images of the defender; default (0): 5 % of the training set."""
    rows: tuple[str, ...] = ()
    """Rows of the table; default: the scale's."""


PAPER_AGAIN = {**PAPER, "unlearn": 20, "batch": 256}
CPU_AGAIN = {**CPU, "unlearn": 12, "batch": 64}
QUICKEST_AGAIN = {**QUICKEST, "unlearn": 1, "batch": 64, "images": 200, "attacks": ("BadNets",)}


def recipe(dataset: str, epochs: int) -> FitConfig:
    """The victim's training: the paper's, or Adam along a cosine for fewer than 50 epochs."""
    if epochs < 50:
        return FitConfig(epochs, 32, learning_rate=2e-3, schedule="cosine")
    augment: Any = "crop_flip" if dataset == "cifar10" else "crop"
    return FitConfig(epochs, 128, "sgd", 0.1, 0.9, 5e-4, "step", augment)


def cell_of(
    options: Rows,
    dataset: str,
    name: str,
    label: str,
    defense: Defense,
    paper: Mapping[str, str] | None = None,
    images: int | None = None,
    stages: Sequence[Reactivation] = (),
) -> Cell:
    """The row of one attack and one defense.

    Args:
      options: model, epochs and where the data sets are.
      dataset: name in NAMES.
      name: of the attack in ATTACKS.
      label: of the defense.
      defense: module and Config; None: the victim itself.
      paper: columns of the published row besides paper, data set, model and attack; None: there is none.
      images: clean images of the defender; None: 5 % of the training set.
      stages: the attacks on the purified model.

    Returns:
      The cell.
    """
    attack, changes, _ = ATTACKS[name]
    published = "VGG-19" if paper is not None and dataset == "gtsrb" else "ResNet-18"
    small = [f"{options.model} for {published}"] * (options.model != published.lower().replace("-", ""))
    small += [f"{options.epochs} of 200 epochs"] * (options.epochs != 200) + ["digits"] * (options.scale == "smoke")
    if isinstance(options, ReactivatedRows) and options.unlearn != 20:
        small.append(f"{options.unlearn} of 20 epochs of BI-BAU")
    module, config = defense or (None, None)
    query = {"paper": "bibau", "dataset": NAMES[dataset], "model": published, "attack": name}
    return Cell(
        label=f"{'' if dataset == 'cifar10' else NAMES[dataset] + ', '}{name}, {label}",
        experiment=Experiment(
            attack,
            module,
            options.sources[dataset],
            options.model,
            attack_config=config_of("attacks", attack)(**changes),
            defense_config=config,
            fit=recipe(dataset, options.epochs),
            split=SplitConfig(source="train", size=images, validation=0.0),
        ),
        paper=None if paper is None else {**query, **paper},
        scale="; ".join(small),
        stages=tuple(stages),
    )


def bibau_config(options: ReactivatedRows, name: str, **changes: Any) -> bibau.Config:
    """BI-BAU's Config for an attack.

    Args:
      options: epochs, batches and norm.
      name: of the attack in ATTACKS.
      **changes: of further fields.

    Returns:
      The Config.
    """
    preset: Any = ATTACKS[name][2]
    fields: dict[str, Any] = {"epochs": options.unlearn, "batch_size": options.batch, "norm": options.norm, **changes}
    if options.scale == "smoke":
        fields["steps"] = 2
    return bibau.Config(procedure="paper", preset=preset, **fields)


def reactivated_cell(options: ReactivatedRows, dataset: str, name: str, row: str, defense: Defense) -> Cell:
    """A row whose model is attacked by retuning and by queries; of the victim itself, a clean model is attacked, too.

    Args:
      options: of the table.
      dataset: name in NAMES.
      name: of the attack in ATTACKS.
      row: label of the defense.
      defense: module and Config; None: the victim itself.

    Returns:
      The cell.
    """
    count = RETUNING.get(name, 5 if dataset == "gtsrb" else 2)
    earlier = {"retuning": retuning.Config(count=count)}
    queries = None
    if options.scale == "smoke":
        earlier = {"retuning": retuning.Config(count=count, share=0.1, epochs=1)}
        queries = query_reactivation.Config(count=32, hidden=8, epochs=1, batch_size=32)
    beside = defense is None
    stages = (
        Reactivation("retuning", earlier["retuning"], earlier, beside),
        Reactivation("query_reactivation", queries, earlier, beside),
    )
    return cell_of(options, dataset, name, row, defense, images=options.images or None, stages=stages)


def reactivation_table(results: Sequence[CellResult]) -> str:
    """Mean and standard deviation over seeds of every attack and row, in percent, as Markdown."""
    lines = ["| attack | defense | seeds | ACC | ASR | R-ACC | R-ASR | Q-ASR |", "|---|---|---|---|---|---|---|---|"]
    by_attack: dict[str, list[CellResult]] = {}
    for result in results:
        by_attack.setdefault(result.cell.label.rpartition(", ")[0], []).append(result)
    for attack, of_attack in by_attack.items():
        groups: dict[str, list[dict[str, Any]]] = {"none": _victims(of_attack)}
        for result in of_attack:
            if result.cell.experiment.defense is not None:
                groups.setdefault(result.cell.label.rpartition(", ")[2], []).append(_rates(result, ""))
        groups["clean model"] = [_rates(r, "clean_") for r in of_attack if r.cell.experiment.defense is None]
        for label, rates in groups.items():
            if rates:
                columns = ("acc", "asr", "r_acc", "r_asr", "q_asr")
                cells = [_spread([100 * row[column] for row in rates if column in row]) for column in columns]
                lines.append(f"| {attack} | {label} | {len(rates)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _victims(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Rates of the victims, by seed; after re-activation where the victim itself was attacked."""
    victims: dict[int, dict[str, Any]] = {}
    for result in results:
        before = result.result["before"]
        victims.setdefault(result.seed, {"acc": before["acc"], "asr": before["asr"]})
        if result.cell.experiment.defense is None:
            victims[result.seed] = _rates(result, "")
    return list(victims.values())


def _rates(result: CellResult, which: str) -> dict[str, Any]:
    """Rates before and after the re-activation attacks; `which` is "clean_" for those of the clean model."""
    retuned, queried = (result.stages[name] for name in ("retuning", "query_reactivation"))
    before, after = retuned[f"{which}before"], retuned[f"{which}after"]
    return {
        "acc": before["acc"],
        "asr": before["asr"],
        "r_acc": after["acc"],
        "r_asr": after["asr"],
        "q_asr": queried[f"{which}after"]["asr"],
    }


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")
