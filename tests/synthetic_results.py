"""Directories of results with numbers that are worked out by hand, and the table of one as rows."""

import csv
import io
import json
from pathlib import Path

from bdjax.reports import table

PAPERS = Path(__file__).parents[1] / "experiments" / "papers"
BADNETS = {
    "paper": "ibau", "table": "1", "dataset": "CIFAR-10", "model": "simplified VGG", "attack": "BadNets",
    "defense": "I-BAU",
}  # fmt: skip


def write(directory, seed=0, acc=0.80, asr=0.10, cell=None, **changes):
    """A result.json like the one bdjax.pipelines.run.defend writes; before: ACC 90 %, ASR 100 %. Returns its path."""
    result = {
        "attack": "badnets", "defense": "ibau", "dataset": "cifar10", "model": "small_vgg", "seed": seed,
        "n_test": 5000, "n_asr": 4500, "n_defender": 5000,
        "before": {"acc": 0.9, "asr": 1.0, "asr_with_target": 1.0},
        "after": {"acc": acc, "asr": asr, "asr_with_target": asr + 0.05},
        "seconds": {"attack": 9.0, "defense": 10.0 + seed, "compile": 3.0},
        "peak_memory_bytes": (100 + seed) * 2**20, "peak_memory_of": "device",
        "attack_config": {"target": 8, "ratio": 0.2}, "defense_config": {"rounds": 100, "solver": "fixed_point"},
        "fit": {"epochs": 20}, "split": {"source": "test", "size": None},
        "victim_hash": "v", "env": {"device": "H200", "devices": 1, "bdjax": "0.1.0", "commit": "abc", "jax": "0.12"},
        **changes,
    }  # fmt: skip
    if cell is not None:
        result["cell"] = cell
    result.setdefault("config_hash", json.dumps([result["defense_config"], result["attack_config"], seed]))
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result))
    return directory / "result.json"


def cell(index=0, label="BadNets", scale="", paper=None):
    return {"index": index, "label": label, "scale": scale, "paper": paper}


def plan(directory, *cells, seeds=(0, 1, 2)):
    names = {"attack": "badnets", "defense": "ibau", "dataset": "cifar10", "model": "small_vgg", "seeds": list(seeds)}
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "file": "experiments/ibau/table1.py",
        "title": "I-BAU, Table 1",
        "cells": [{**c, **names} for c in cells],
    }
    (directory / "cells.json").write_text(json.dumps(content))


def parsed(directory, papers=None):
    return list(csv.DictReader(io.StringIO(table.report(directory, "csv", papers))))
