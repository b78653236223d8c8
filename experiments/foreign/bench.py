"""Defenses with their defaults on models that their settings were not chosen on: ACC, ASR, drop, seconds, memory.

    python experiments/foreign/bench.py victims.json --out runs/foreign [--defenses ibau,bibau,auto]
        [--sizes 100,500,2500] [--seeds 0,1,2] [--sets dev,test] [--measured 2000]

`victims.json` is a list of {"name", "set", "path", "dataset"}: the path of a victim directory, or of a weight file,
which also needs "model", "attack" and "attack_config" (how it is imported, and the trigger that it is measured with).
Paths are relative to the file; "set" is any word, "dev" for victims that settings were chosen on. The defender's images
are a stratified part of the test split; everything is measured on the rest of it. A finished run is not made again.

Time on 2 CPU cores: see the table in README.md beside this file.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from bdjax import datasets, interop, registry
from bdjax.config import SplitConfig
from bdjax.io import checkpoint
from bdjax.pipelines.context import Context
from bdjax.pipelines.defend import DefenseRequest, defend
from bdjax.pipelines.opening import EvaluationSource


def main() -> None:
    """Run what is missing, write rows.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victims", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/foreign"))
    parser.add_argument("--defenses", default="ibau,bibau,auto")
    parser.add_argument("--sizes", default="500")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sets", default="")
    parser.add_argument("--measured", type=int, default=0, help="held-out images to measure on, at most; 0: all")
    options = parser.parse_args()
    rows = []
    for victim in json.loads(options.victims.read_text()):
        if options.sets and victim["set"] not in options.sets.split(","):
            continue
        for size in map(int, options.sizes.split(",")):
            for seed in map(int, options.seeds.split(",")):
                for defense in options.defenses.split(","):
                    rows.append(one(victim, options.victims.parent, defense, size, seed, options.out, options.measured))
                    checkpoint.write_text(options.out / "rows.json", json.dumps(rows, indent=1) + "\n")
                    checkpoint.write_text(options.out / "table.md", table(rows))


def one(
    victim: dict[str, Any], folder: Path, defense: str, size: int, seed: int, out: Path, measured: int
) -> dict[str, Any]:
    """Defend one victim, measure on at most `measured` held-out images (0: all), and return its row."""
    path = folder / victim["path"]
    given: dict[str, Any] = {}
    dataset = victim["dataset"]
    if not dataset.startswith("tfds:"):
        kind, _, place = dataset.partition(":")
        dataset = f"{kind}:{folder / place}"
    if path.is_file():
        directory = out / "imported" / victim["name"]
        if not directory.exists():
            interop.import_model(path, directory, model=victim["model"], env={})
        fields = dict(victim["attack_config"])
        for name in {"trigger", "mask"} & set(fields):
            fields[name] = str(folder / fields[name])
        given = {
            "attack": victim["attack"],
            "attack_config": registry.load("attacks", victim["attack"]).Config(**fields),
        }
        path = directory
    config = registry.load("defenses", defense).Config()
    source = EvaluationSource(dataset, datasets.load(dataset), **given)
    request = DefenseRequest(path, defense, config, SplitConfig("test", size, "stratified"), seed, source)
    directory = out / f"{victim['name']}-{defense}-{size}-{seed}"
    result: Any = defend(request, directory, Context(estimate=True, measured=measured))
    rounds = result["rounds"]
    chosen = next((int(row["chosen"]) for row in rounds if "chosen" in row), None)
    return {
        "victim": victim["name"], "set": victim["set"], "defense": defense, "size": size, "seed": seed,
        "n_test": result["n_test"], "n_asr": result["n_asr"],
        **{f"{phase}_{rate}": 100 * result[phase][rate] for phase in ("before", "after") for rate in ("acc", "asr")},
        "detection": result["detection"], "seconds": result["seconds"]["defense"],
        "rolled_back": any("rolled_back_to" in row for row in rounds),
        "ctca": [result[phase]["ctca"] for phase in ("before", "after")],
        "estimate": result["estimate"],
        "chosen": None if chosen is None else config.methods[chosen] if chosen >= 0 else "none",
        "peak_memory_bytes": result["peak_memory_bytes"], "device": result["env"]["device"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and for each defense and size how many victims meet the goal."""
    lines = [
        "| set | victim | defense | images | seed | ACC before, after | ASR before, after | estimate | seconds | GB "
        "| n (ACC, ASR) |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda r: (r["set"], r["victim"], r["size"], r["seed"], r["defense"])):
        back = " (rolled back)" if row["rolled_back"] else f" ({row['chosen']})" if row.get("chosen") else ""
        estimate = f"{100 * row['estimate']['rate']:.0f}" if row.get("estimate") else ""
        lines.append(
            f"| {row['set']} | {row['victim']} | {row['defense']}{back} | {row['size']} | {row['seed']} "
            f"| {row['before_acc']:.1f}, {row['after_acc']:.1f} | {row['before_asr']:.1f}, {row['after_asr']:.1f} "
            f"| {estimate} | {row['seconds']:.0f} | {row['peak_memory_bytes'] / 1e9:.1f} "
            f"| {row['n_test']}, {row['n_asr']} |"
        )
    lines += [
        "",
        "| set | defense | images | goal met | median ASR after | median loss of ACC |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for key in sorted({(row["set"], row["defense"], row["size"]) for row in rows}):
        of_key = [row for row in rows if (row["set"], row["defense"], row["size"]) == key]
        highest, drop = (10, 3) if key[2] >= 500 else (20, 5)
        lost = [row["before_acc"] - row["after_acc"] for row in of_key]
        met = sum(row["after_asr"] <= highest and loss <= drop for row, loss in zip(of_key, lost, strict=True))
        asr = median(row["after_asr"] for row in of_key)
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {met} of {len(of_key)} | {asr:.1f} | {median(lost):.1f} |")
    lines += [
        "",
        "Goal: ASR at most 10 % and ACC at most 3 points lower; with fewer than 500 images 20 % and 5 points.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
