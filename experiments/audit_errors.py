"""How often `bdjax audit` is wrong: ten clean and ten backdoored models, a method's verdicts and the joint one.

    python experiments/audit_errors.py

Environment: DATA (default digits), MODEL (cnn), EPOCHS (20), OUT (runs/audit_errors), SIZE (clean images an audit gets;
default as in `bdjax audit`), BASE (0; models have the seeds BASE to BASE + 9) and METHODS (names with commas between;
default all). Model i has the i-th attack of ATTACKS with its defaults and target 9 - i; beside it stands a clean one of
the same seed. Thresholds were chosen with BASE=100 on digits and MNIST; what is reported has BASE=0. A finished audit
(OUT/NAME-SEED.json) is not made again.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from bdjax import datasets, registry
from bdjax.config import Experiment, SplitConfig
from bdjax.engine import FitConfig
from bdjax.io import checkpoint
from bdjax.pipelines.audit import AuditSettings, audit
from bdjax.pipelines.context import Context
from bdjax.pipelines.opening import EvaluationSource, open_recorded
from bdjax.pipelines.training import train, victim_directory

DATA, MODEL = os.environ.get("DATA", "digits"), os.environ.get("MODEL", "cnn")
OUT = Path(os.environ.get("OUT", "runs/audit_errors"))
BASE, EPOCHS = int(os.environ.get("BASE", "0")), int(os.environ.get("EPOCHS", "20"))
SIZE = int(os.environ["SIZE"]) if "SIZE" in os.environ else None
METHODS = [name for name in os.environ.get("METHODS", "").split(",") if name]
ATTACKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("badnets", {}),
    ("blended", {}),
    ("l0_inv", {}),
    ("trojan_sq", {}),
    ("l2_inv", {}),
    ("badnets", {"position": "random", "pattern": 0}),
    ("trojan_wm", {}),
    ("smooth", {}),
    ("adaptive_blend", {}),
    ("rgba_patch", {}),
)


def main() -> None:
    """Train what is missing, audit it, write table.md."""
    OUT.mkdir(parents=True, exist_ok=True)
    data, context = datasets.load(DATA), Context(1, store=OUT / "victims")
    for i, (attack, changes) in enumerate(ATTACKS):
        for name, fields in (("clean", {}), (attack, {**changes, "target": 9 - i})):
            path = OUT / f"{name}-{BASE + i}.json"
            if not path.exists():
                found = one(name, fields, BASE + i, data, context)
                checkpoint.write_text(path, json.dumps(found, indent=1) + "\n")
                sys.stdout.write(f"{json.dumps({k: found[k] for k in ('attack', 'target', 'asr', 'says')})}\n")
                sys.stdout.flush()
    checkpoint.write_text(
        OUT / "table.md", table([json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))])
    )


def one(name: str, fields: dict[str, Any], seed: int, data: Any, context: Context) -> dict[str, Any]:
    """Train a model, measure its ASR, audit it."""
    config = registry.load("attacks", name).Config(**fields)
    split = SplitConfig(size=1)
    experiment = Experiment(name, None, DATA, MODEL, seed, config, fit=FitConfig(EPOCHS), split=split)
    directory = victim_directory(experiment, data.fingerprint, OUT / "victims")
    train(experiment, directory, context, data)
    judged = open_recorded(directory, EvaluationSource(data=data))
    measured = judged.evaluation.measure(judged.victim.variables)
    settings = AuditSettings(seed)
    result, _ = audit(directory, METHODS, dataset=DATA, size=SIZE, settings=settings, context=context)
    return {
        "attack": name,
        "target": fields.get("target"),
        "seed": seed,
        "data": data.name,
        "model": MODEL,
        "epochs": EPOCHS,
        "n": result["n"],
        "n_test": len(judged.evaluation.labels),
        "acc": measured["acc"],
        "asr": measured["asr"] if name != "clean" else None,
        "methods": result["methods"],
        "says": [result["poisoned"], result["target"], result["accused_by"]],
        "env": result["env"],
    }


def rates(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """By method, and of all together: accused clean, clean models, accused and rightly named backdoored, backdoored."""
    found = {}
    for name in [*rows[0]["methods"], "verdict"]:
        counts = [0, 0, 0, 0, 0]
        for row in rows:
            own = row["methods"].get(name)
            says, label = (own["poisoned"], own["target"]) if own else row["says"][:2]
            if row["attack"] == "clean":
                counts[0] += says
                counts[1] += 1
            else:
                counts[2] += says
                counts[3] += bool(says and label == row["target"])
                counts[4] += 1
        found[name] = counts
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Error rates as Markdown, then each backdoored model with who accused which class."""
    lines = [
        f"{rows[0]['data']}, {rows[0]['model']}, {rows[0]['epochs']} epochs, {rows[0]['n']} clean images an audit",
        "",
        "| method | clean models accused | backdoored models accused | of the right class |",
        "|---|---|---|---|",
    ]
    for name, (false, clean, true, right, poisoned) in rates(rows).items():
        lines.append(f"| {name} | {false} of {clean} | {true} of {poisoned} | {right} of {poisoned} |")
    methods = list(rows[0]["methods"])
    head = " | ".join(methods)
    lines += ["", f"| model | target | ASR | {head} | verdict |", "|---|---|---|" + "---|" * (len(methods) + 1)]
    for row in rows:
        cells = [_says(own["poisoned"], own["target"], own["score"]) for own in row["methods"].values()]
        asr = "" if row["asr"] is None else f"{100 * row['asr']:.1f}"
        target = "" if row["target"] is None else row["target"]
        name, joint = f"{row['attack']}, seed {row['seed']}", _says(*row["says"][:2])
        lines.append(f"| {name} | {target} | {asr} | {' | '.join(cells)} | {joint} |")
    return "\n".join(lines) + "\n"


def _says(poisoned: bool, target: int | None, score: float | None = None) -> str:
    value = "" if score is None else f" ({score:.2f})"
    return f"class {target}{value}" if poisoned else f"clean{value}"


if __name__ == "__main__":
    main()
