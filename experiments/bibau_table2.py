"""BI-BAU, Table 2: is the backdoor gone, or asleep? ACC, ASR, then R-ASR and Q-ASR of each purified model.

    BDJAX_CIFAR10=npz:cifar10.npz python experiments/bibau_table2.py [ATTACK ...]

Attacks as in bibau_table1.py (default BadNets Blended IAD), whose victims these are. Each is purified by BI-BAU (U) and
(T), I-BAU and IBU (the idealised one), then attacked again by retuning (RA) and by queries (QRA), and so are the victim
itself ("none") and a clean model: what five poisoned images implant in *that* is the floor, not 0.

Environment: DATA, MODEL, EPOCHS, NORM as in bibau_table1.py; SEEDS=0,1,2; UNLEARN=n epochs of BI-BAU for the paper's
20, BATCH=n images a step for its 256; SIZE=n images for the defender's 5 % of the training set; ROWS="BI-BAU (U),I-BAU"
some of the rows. VALIDATE=1 takes every fifth *training* image in the test set's place: what has to be chosen is chosen
there, with seeds that are not reported. A finished row (OUT/ATTACK-SEED-ROW.json) is not computed again.

To expect (the paper, ResNet-18, averages of ten attacks; ASR, R-ASR, Q-ASR): IBU 0.44, 10.04, 1.47; (T) 3.97, 16.74,
6.53; (U) 3.91, 12.48, 5.75. What came out here, at CPU scale: experiments/results/bibau_table2.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import datasets
from bdjax.attacks import retuning
from bdjax.config import Experiment, SplitConfig, config_of, to_json
from bdjax.defenses import bibau
from bdjax.io import checkpoint
from bdjax.pipelines.context import Context
from bdjax.pipelines.reactivation import ReactivationRequest, reactivate
from bdjax.pipelines.run import RunRequest, run
from bdjax.pipelines.training import train, victim_directory
from bdjax.registry import load_file

table1: Any = load_file(Path(__file__).with_name("bibau_table1.py"))

OUT = Path(os.environ.get("OUT", "runs/bibau_table2"))
SEEDS = tuple(int(seed) for seed in os.environ.get("SEEDS", "0,1,2").split(","))
UNLEARN = int(os.environ.get("UNLEARN", "20"))
BATCH = int(os.environ.get("BATCH", "256"))
SIZE = int(os.environ["SIZE"]) if "SIZE" in os.environ else None
COUNTS = {"BadNets": 5, "WaNet": 5, "IAD": 5, "ISSBA": 5, "Blended": 1}  # poisoned images of RA
OTHERWISE = 5 if table1.DATA == "gtsrb" else 2


Rows = dict[str, tuple[str, Callable[[str], Any]] | None]
"""A row's label: the defense and its Config for an attack of table1.ATTACKS; None: the victim itself."""


def of_bibau(**changes: Any) -> tuple[str, Callable[[str], Any]]:
    """A row of BI-BAU: its defaults, changed so."""
    given = {"epochs": UNLEARN, "batch_size": BATCH, "norm": table1.NORM} | changes
    return "bibau", lambda name: bibau.Config(procedure="paper", preset=table1.ATTACKS[name][2], **given)


DEFENSES: Rows = {
    "none": None,
    "I-BAU": ("ibau", lambda name: config_of("defenses", "ibau")(schedule="release")),
    "IBU": ("ibu", lambda name: config_of("defenses", "ibu")()),
    "BI-BAU (T)": of_bibau(variant="targeted"),
    "BI-BAU (U)": of_bibau(),
}


def main(names: list[str], known: Rows = DEFENSES) -> None:
    """Run the attacks' rows, those of `known` that ROWS names or all, then write table.md from what is in OUT."""
    chosen = [row for row in os.environ.get("ROWS", ",".join(known)).split(",") if row]
    for kind, given, all_ in (("attack", names, table1.ATTACKS), ("row", chosen, known)):
        if unknown := [name for name in given if name not in all_]:
            raise SystemExit(f"no {kind} {', '.join(unknown)}. Known: {', '.join(all_)}.")
    OUT.mkdir(parents=True, exist_ok=True)
    source = _validation(table1.SOURCE) if os.environ.get("VALIDATE") else table1.SOURCE
    for seed in SEEDS:
        for name in names:
            for row in chosen:
                path = OUT / f"{name}-{seed}-{''.join(c for c in row if c.isalnum() or c in '-+.')}.json"
                if not path.exists():
                    found = one(name, row, known[row], seed, source)
                    checkpoint.write_text(path, json.dumps(found, indent=1) + "\n")
                    sys.stdout.write(f"{json.dumps(found['rates'])} {name} {row} {seed}\n")
                    sys.stdout.flush()
    rows = [json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))]
    checkpoint.write_text(OUT / "table.md", table(rows, list(known)))


def one(name: str, row: str, defense: Any, seed: int, source: str) -> dict[str, Any]:
    """Plant or find the victim, purify it, attack it twice. Rates are fractions."""
    attack, changes, _ = table1.ATTACKS[name]
    planted = config_of("attacks", attack)(**changes)
    split = SplitConfig(source="train", size=SIZE, validation=0.0)
    experiment = Experiment(attack, None, source, table1.MODEL, seed, planted, fit=table1.RECIPE, split=split)
    context, data = Context(1, store=OUT / "victims"), datasets.load(source)
    directory = train(experiment, victim_directory(experiment, data.fingerprint, OUT / "victims"), context, data)
    if defense is not None:
        defending = Experiment(
            attack, defense[0], source, table1.MODEL, seed, planted, defense[1](name), table1.RECIPE, split
        )
        result, directory = run(RunRequest(defending, OUT), context)
    retuned = {"retuning": retuning.Config(count=COUNTS.get(name, OTHERWISE))}
    again = {
        which: reactivate(
            ReactivationRequest(
                directory, which, retuned.get(which), seed, retuned, attack_clean_model=defense is None
            ),
            context=context,
        )
        for which in ("retuning", "query_reactivation")
    }
    short = {"retuning": "ra", "query_reactivation": "qra"}
    first = again["retuning"]
    found = {"before": first["before"]} | {short[which]: again[which]["after"] for which in again}
    clean = None
    if defense is None:
        clean = {"before": first["clean_before"]} | {short[which]: again[which]["clean_after"] for which in again}
    return {
        "attack": name,
        "row": row,
        "seed": seed,
        "data": source.split("/")[-1],
        "model": table1.MODEL,
        "fit": to_json(table1.RECIPE),
        "n_test": first["n_test"],
        "n_asr": first["n_asr"],
        "n_defender": None if defense is None else result["n_defender"],
        "rates": found,
        "victim": first["before"] if defense is None else result["before"],
        "clean": clean,
        "config": None if defense is None else result["defense_config"],
        "retuning": first["config"],
        "seconds": {"defense": None if defense is None else result["seconds"]["defense"]}
        | {short[which]: again[which]["seconds"]["attack"] for which in again},
        "env": first["env"],
    }


def _validation(source: str) -> str:
    """The training set of `source`, a fifth of it in the place of its test set, as npz in OUT."""
    path = OUT / "validation.npz"
    if not path.exists():
        data = datasets.load(source)
        held = np.arange(len(data.y_train)) % 5 == 4
        x, y = data.x_train, data.y_train
        np.savez(path, x_train=x[~held], y_train=y[~held], x_test=x[held], y_test=y[held], classes=data.classes)
    return f"npz:{path}"


def table(rows: list[dict[str, Any]], labels: list[str]) -> str:
    """Mean and standard deviation over seeds of every attack and row, in percent, as Markdown."""
    lines = ["| attack | defense | seeds | ACC | ASR | R-ACC | R-ASR | Q-ASR |", "|---|---|---|---|---|---|---|---|"]
    whats = (("before", "acc"), ("before", "asr"), ("ra", "acc"), ("ra", "asr"), ("qra", "asr"))
    for name in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == name]
        victims = {row["seed"]: {"before": row["victim"]} for row in own}
        victims |= {row["seed"]: row["rates"] for row in own if row["row"] == "none"}
        groups = {"none": list(victims.values())}
        groups |= {label: [row["rates"] for row in own if row["row"] == label] for label in labels if label != "none"}
        groups["clean model"] = [row["clean"] for row in own if row["clean"]]
        for label, found in groups.items():
            if found:
                cells = [[100 * rates[when][what] for rates in found if when in rates] for when, what in whats]
                lines.append(f"| {name} | {label} | {len(found)} | {' | '.join(map(_spread, cells))} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main(sys.argv[1:] or ["BadNets", "Blended", "IAD"])
