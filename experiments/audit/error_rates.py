"""How often `bdjax audit` is wrong: clean and backdoored models of seven families, with 100 clean images and with none.

    python experiments/audit/error_rates.py --data DATA --out runs/audit
    python experiments/audit/error_rates.py --data DATA --out runs/audit --half development
    python experiments/audit/error_rates.py --out runs/audit --table-only

Trains every model of the half that is missing, audits it with the detectors' defaults (stratified test images, seed 0),
writes a line of JSON a model to OUT/rows-HALF.jsonl, and OUT/table-HALF.md. Thresholds and priors of the detectors were
chosen on the development half alone; the held-out half has other seeds, other targets and more kinds of attack.

DATA holds mnist.npz (10,000 training images), fashion.npz (10,000), cifar10.npz (20,000) and gtsrb.npz (16,000 cut-out
signs), 4,000 test images each; digits need no file. --families picks some of them.

Models: `cnn` (digits 20 epochs, MNIST 4, Fashion-MNIST and GTSRB 5, CIFAR-10 6), `small_vgg` and ResNet-20 on CIFAR-10
(5); Adam 2e-3 (digits 1e-3) falling along a cosine, batches of 64 (digits 128). Beside each backdoored model stands a
clean one of the same family and seed. A backdoored model counts when its ASR is at least 80 %; the others are listed.
The development half contains the models that an earlier version held out; the priors were widened on them.

Time: 20 s to 5 minutes a model on 2 CPU cores, about 2.5 hours for the held-out half; an audit takes 5 to 60 s.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from bdjax import datasets, metrics, registry
from bdjax.config import Experiment, SplitConfig
from bdjax.engine import FitConfig
from bdjax.io import checkpoint
from bdjax.pipelines.audit import NO_IMAGES, AuditSettings, audit, choose_detectors, run_detectors
from bdjax.pipelines.context import Context
from bdjax.pipelines.opening import EvaluationSource, open_recorded
from bdjax.pipelines.training import train

STRONG = 0.8
"""ASR from which a backdoor counts as planted."""


@dataclass(frozen=True)
class Family:
    """Models of one architecture and data set."""

    dataset: str
    """Name of the file in DATA, or "digits"."""
    model: str
    epochs: int
    learning_rate: float = 2e-3
    batch_size: int = 64


FAMILIES = {
    "digits": Family("digits", "cnn", 20, 1e-3, 128),
    "mnist": Family("mnist", "cnn", 4),
    "fashion": Family("fashion", "cnn", 5),
    "cifar": Family("cifar10", "cnn", 6),
    "cifar_resnet": Family("cifar10", "resnet_cifar", 5),
    "gtsrb": Family("gtsrb", "cnn", 5),
    "cifar_vgg": Family("cifar10", "small_vgg", 5),
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "random_patch": ("badnets", {"position": "random", "pattern": 0}),
    "sig": ("sig", {"labels": "all_to_one", "ratio": 0.1}),
    "iad": ("iad", {"epochs": 8}),
    "ssdt": ("ssdt", {"epochs": 8}),
    "all_to_all": ("badnets", {"labels": "all_to_all", "ratio": 0.3}),
}
"""Attacks that are not an attack's defaults."""
HALVES: dict[str, dict[str, tuple[tuple[int, str], ...]]] = {
    "development": {
        "digits": (
            (100, "badnets blended smooth l2_inv adaptive_blend trojan_wm"),
            (0, "badnets blended l0_inv trojan_sq l2_inv random_patch trojan_wm smooth adaptive_blend rgba_patch"),
        ),
        "mnist": ((200, "blended badnets sig wanet"), (20, "badnets smooth wanet l2_inv trojan_wm sig iad all_to_all")),
        "fashion": (
            (300, "smooth trojan_sq badnets blended"),
            (40, "badnets blended l0_inv trojan_wm sig wanet rgba_patch trojan_sq"),
        ),
        "gtsrb": ((400, "trojan_wm blended badnets"),),
        "cifar": ((500, "badnets blended l2_inv"),),
    },
    "held_out": {
        "digits": ((1000, "badnets blended l0_inv trojan_sq l2_inv random_patch trojan_wm smooth adaptive_blend"),),
        "mnist": ((2000, "badnets smooth wanet l2_inv trojan_wm sig ssdt all_to_all"),),
        "fashion": ((3000, "badnets blended l0_inv trojan_wm sig wanet rgba_patch trojan_sq"),),
        "gtsrb": ((4000, "badnets blended smooth trojan_sq wanet l0_inv"),),
        "cifar": ((5000, "badnets blended sig l0_inv smooth"),),
        "cifar_resnet": ((6000, "badnets blended trojan_wm"),),
        "cifar_vgg": ((7000, "trojan_wm badnets"),),
    },
}  # fmt: skip
"""By half and family: first seeds, and the attacks of the consecutive seeds from there."""


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    data: Path = Path()
    """Directory of the data sets."""
    out: Path = Path("runs/audit")
    """Directory of models, rows and tables."""
    half: Literal["held_out", "development"] = "held_out"
    """Which models."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """Families that are measured."""
    most: int | None = None
    """Models of each family, at most; default: all."""
    images: int = 100
    """Clean images of an audit, as many of each class as there are."""
    clean_only: bool = False
    """Leave the backdoored models out: those of the development half serve as references of the other half."""
    train: bool = True
    """Train missing models; otherwise only models that exist are audited."""
    table_only: bool = False
    """Write the table of the rows that exist, and measure nothing."""


def main(options: Options) -> None:
    """Measure what is missing and write the table."""
    options.out.mkdir(parents=True, exist_ok=True)
    rows_path = options.out / f"rows-{options.half}.jsonl"
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()] if rows_path.exists() else []
    finished = {row["name"] for row in rows}
    for entry in [] if options.table_only else population(options):
        if entry["name"] in finished or not (options.train or (options.out / "models" / entry["name"]).exists()):
            continue
        rows.append(measure(entry, options))
        with rows_path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.write(f"{describe(rows[-1])}\n")
        sys.stdout.flush()
    if rows:
        references = options.out / "rows-development.jsonl"
        known = references.exists() and options.half == "held_out"
        development = [json.loads(line) for line in references.read_text().splitlines()] if known else []
        checkpoint.write_text(options.out / f"table-{options.half}.md", table(rows, development))


def with_references(row: Mapping[str, Any], development: list[dict[str, Any]], mode: str) -> dict[str, Any] | None:
    """The verdict on a model when the clean development models of its family are its references.

    Args:
      row: of the model.
      development: rows of the development half, whose audits had the same images.
      mode: "images" or "none".

    Returns:
      {"poisoned", "target", "p_value"}; None with fewer than two references.
    """
    clean = [r[mode]["methods"] for r in development if r["family"] == row["family"] and r["kind"] == "clean"]
    if len(clean) < 2:
        return None
    p_values, targets = {}, {}
    for name, method in row[mode]["methods"].items():
        own = np.array(method["classes"], np.float64)
        classes = metrics.reference_p_values(own, np.array([other[name]["classes"] for other in clean], np.float64))
        p_values[name], targets[name] = metrics.model_p_value(classes), int(np.argmin(classes))
    corrected = metrics.holm(p_values)
    surest = min(corrected, key=lambda name: corrected[name])
    poisoned = corrected[surest] <= row[mode]["level"]
    return {"poisoned": poisoned, "target": targets[surest] if poisoned else None, "p_value": corrected[surest]}


def population(options: Options) -> list[dict[str, Any]]:
    """The models of a half: family, kind, seed, target and name; each backdoored one is followed by a clean one."""
    entries = []
    for family, groups in HALVES[options.half].items():
        seeded = [pair for first, kinds in groups for pair in enumerate(kinds.split(), first)]
        for seed, kind in seeded[: options.most] if family in options.families else []:
            for name, target in ((kind, (7 * seed + 3) % 10), ("clean", None)):
                entries.append({"family": family, "kind": name, "seed": seed, "target": target})
    if options.clean_only:
        entries = [entry for entry in entries if entry["kind"] == "clean"]
    return [{**entry, "name": f"{entry['family']}-{entry['kind']}-{entry['seed']}"} for entry in entries]


def measure(entry: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Train a model if it is missing, measure its ASR, audit it with and without images."""
    family = FAMILIES[entry["family"]]
    source = family.dataset if family.dataset == "digits" else f"npz:{options.data / family.dataset}.npz"
    data, context = datasets.load(source), Context(1)
    attack, fields = KINDS.get(entry["kind"], (entry["kind"], {}))
    config = registry.load("attacks", attack).Config(
        **fields, **({} if attack == "clean" else {"target": entry["target"]})
    )
    fit = FitConfig(family.epochs, family.batch_size, "adam", family.learning_rate, schedule="cosine")
    experiment = Experiment(
        attack, None, source, family.model, entry["seed"], config, fit=fit, split=SplitConfig(size=1)
    )
    directory = options.out / "models" / entry["name"]
    train(experiment, directory, context, data)
    artifact = open_recorded(directory, EvaluationSource(data=data))
    rates = artifact.evaluation.measure(artifact.victim.variables)
    drawn = stratified(data.y_test, options.images)
    settings = AuditSettings(0)
    with_images, _ = run_detectors(
        artifact, data.x_test[drawn], data.y_test[drawn], choose_detectors(), settings, context
    )
    without, _ = audit(directory, dataset=NO_IMAGES, settings=settings, context=context)
    clean = attack == "clean"
    return {
        **entry, "model": family.model, "classes": len(data.classes), "acc": round(float(rates["acc"]), 4),
        "asr": None if clean else round(float(rates["asr"] or 0.0), 4), "n_test": len(data.y_test),
        "images": _audit_record(with_images), "none": _audit_record(without), "env": with_images["env"],
    }  # fmt: skip


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` images, as many of each class as there are, drawn with seed 0."""
    order = np.random.default_rng(0).permutation(len(labels))
    classes = int(labels.max()) + 1
    share = -(-count // classes)
    drawn = np.concatenate([order[labels[order] == label][:share] for label in range(classes)])
    return np.random.default_rng(1).permutation(drawn)[:count]


def _audit_record(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an audit."""
    fields = ("poisoned", "target", "targets", "p_value", "level", "n")
    methods = {
        name: {field: row[field] for field in ("p_value", "target", "classes", "seconds", "compile")}
        for name, row in result["methods"].items()
    }
    return {**{field: result[field] for field in fields}, "methods": methods}


def describe(row: Mapping[str, Any]) -> str:
    """A line about one model."""
    asr = "" if row["asr"] is None else f" ASR {100 * row['asr']:.1f}"
    found = [
        f"{mode}: class {a['target']} p {a['p_value']:.3g}" if a["poisoned"] else f"{mode}: clean p {a['p_value']:.3g}"
        for mode, a in (("images", row["images"]), ("none", row["none"]))
    ]
    return f"{row['name']} target {row['target']}{asr} | {' | '.join(found)}"


def is_right(row: Mapping[str, Any], mode: str) -> bool:
    """Whether an audit accuses the attack's class; under an all-to-all attack, any class."""
    finding = row[mode]
    return bool(finding["poisoned"] and (row["kind"] == "all_to_all" or finding["target"] == row["target"]))


def table(rows: list[dict[str, Any]], development: list[dict[str, Any]] | None = None) -> str:
    """Error rates with intervals, by family, kind and method, as Markdown.

    Args:
      rows: of the models.
      development: rows of the development half, whose clean models serve as references; None: no references.

    Returns:
      The tables.
    """
    clean = [row for row in rows if row["kind"] == "clean"]
    planted = [row for row in rows if row["kind"] != "clean" and row["asr"] >= STRONG]
    weak = [row for row in rows if row["kind"] != "clean" and row["asr"] < STRONG]
    lines = [
        f"{len(clean)} clean and {len(planted)} backdoored models (ASR at least {100 * STRONG:.0f} %); in brackets the "
        "Clopper-Pearson interval of 95 %.", "",
        "| audit | level | clean models accused | backdoored: right class | wrong class | area under the ROC curve | "
        "seconds, median (most) |",
        "|---|--:|---|---|--:|--:|--:|",
    ]  # fmt: skip
    for mode, label in (("images", "100 clean images"), ("none", "no images")):
        wrong = sum(row[mode]["poisoned"] and not is_right(row, mode) for row in planted)
        seconds = [sum(m["seconds"] for m in row[mode]["methods"].values()) for row in rows]
        accused = sum(row[mode]["poisoned"] for row in clean)
        lines.append(
            f"| {label} | {rows[0][mode]['level']} | {_rate(accused, len(clean))} | "
            f"{_rate(sum(is_right(row, mode) for row in planted), len(planted))} | {wrong} | "
            f"{_area([r[mode]['p_value'] for r in clean], [r[mode]['p_value'] for r in planted]):.2f} | "
            f"{np.median(seconds):.0f} ({max(seconds):.0f}) |"
        )
    for mode, label in (("images", "100 clean images"), ("none", "no images")) if development else ():
        lines.append(_referenced_line(rows, development or [], mode, label))
    lines += [
        "",
        "| detector alone, p at most 0.05 | clean models accused | backdoored: right class |",
        "|---|---|---|",
    ]
    for mode in ("images", "none"):
        for name in rows[0][mode]["methods"]:
            accusing = [row for row in rows if row[mode]["methods"][name]["p_value"] <= 0.05]
            accused = [row for row in accusing if row in clean]
            right = [r for r in accusing if r in planted and r[mode]["methods"][name]["target"] == r["target"]]
            lines.append(f"| {name} | {_rate(len(accused), len(clean))} | {_rate(len(right), len(planted))} |")
    for title, group in (("family", lambda row: row["family"]), ("attack", lambda row: row["kind"])):
        lines += ["", *_by_group(title, group, clean, planted)]
    if weak:
        names = ", ".join(f"{row['name']} ({100 * row['asr']:.0f} %)" for row in weak)
        lines += ["", f"Not counted, because the backdoor was not planted: {names}."]
    return "\n".join(lines) + "\n"


def _referenced_line(rows: list[dict[str, Any]], development: list[dict[str, Any]], mode: str, label: str) -> str:
    """The line of the first table for audits with reference models."""
    judged = [(row, with_references(row, development, mode)) for row in rows]
    compared = [{**row, mode: verdict} for row, verdict in judged if verdict is not None]
    clean = [row for row in compared if row["kind"] == "clean"]
    planted = [row for row in compared if row["kind"] != "clean" and row["asr"] >= STRONG]
    accused = sum(row[mode]["poisoned"] for row in clean)
    right = sum(is_right(row, mode) for row in planted)
    wrong = sum(row[mode]["poisoned"] for row in planted) - right
    area = _area([row[mode]["p_value"] for row in clean], [row[mode]["p_value"] for row in planted])
    name, level = f"{label}, clean development models as references", rows[0][mode]["level"]
    return (
        f"| {name} | {level} | {_rate(accused, len(clean))} | {_rate(right, len(planted))} | {wrong} | {area:.2f} | |"
    )


def _by_group(title: str, group: Callable[[Mapping[str, Any]], str], clean: list[Any], planted: list[Any]) -> list[str]:
    """Rows of the table by family or attack."""
    lines = [
        f"| {title} | clean accused, with images (without) | right class, with images (without) |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(group(row) for row in [*planted, *clean]):
        own_clean, own = ([row for row in rows if group(row) == name] for rows in (clean, planted))
        accused = [sum(row[mode]["poisoned"] for row in own_clean) for mode in ("images", "none")]
        right = [sum(is_right(row, mode) for row in own) for mode in ("images", "none")]
        first = f"{accused[0]} of {len(own_clean)} ({accused[1]})" if own_clean else ""
        second = f"{right[0]} of {len(own)} ({right[1]})" if own else ""
        lines.append(f"| {name} | {first} | {second} |")
    return lines


def _rate(count: int, n: int) -> str:
    """A count with its interval."""
    if not n:
        return "none"
    low, high = metrics.clopper_pearson(count, n)
    return f"{count} of {n} [{100 * low:.0f}, {100 * high:.0f} %]"


def _area(clean: list[float], planted: list[float]) -> float:
    """Area under the ROC curve of the p-value: how often a backdoored model's is smaller than a clean one's."""
    if not clean or not planted:
        return float("nan")
    difference = np.array(clean)[:, None] - np.array(planted)[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
