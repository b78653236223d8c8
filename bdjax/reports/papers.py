"""The published numbers beside ours: rows of experiments/papers/*.csv, picked by their column values."""

import csv
from pathlib import Path
from typing import Any

from bdjax.errors import InputError

PRINTED = ("acc_before", "asr_before", "acc_after", "asr_after", "ctca_after", "score", "seconds")
_METRICS = {"ACC": "acc_after", "ASR": "asr_after", "CTCA": "ctca_after", "SCORE": "score", "TIME_S": "seconds"}
_SETTING = ("paper", "table", "dataset", "model", "attack", "attack_setting")  # columns of the papers' tables
_COLUMNS = (*_SETTING, "defense", "defense_setting", "metric", "value", "std", "note")
_DEFAULT = "experiments/papers"


def read(papers: Path | None) -> list[dict[str, str]]:
    """All rows of the papers' tables, from `papers` or experiments/papers. Raises InputError when there are none."""
    places = [Path(papers)] if papers else [Path(__file__).parents[2] / _DEFAULT, Path.cwd() / _DEFAULT]
    for place in places:
        rows: list[dict[str, str]] = []
        for path in sorted(place.glob("*.csv")):
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if missing := set(_COLUMNS) - set(reader.fieldnames or ()):
                    raise InputError(f"{path} lacks the columns {', '.join(sorted(missing))}. Give another --papers.")
                rows += reader
        if rows:
            return rows
    raise InputError(f"no CSV tables of papers in {' or '.join(map(str, places))}. Say where they are with --papers.")


def printed(query: dict[str, Any], tables: list[dict[str, str]]) -> dict[str, tuple[str, str]]:
    """What the paper prints for the rows that `query` filters, and for the undefended model beside them."""
    if unknown := set(query) - set(_COLUMNS):
        raise InputError(f"paper filter {query} names no column: {', '.join(unknown)}. Use {', '.join(_COLUMNS)}.")
    found: dict[str, dict[str, str]] = {}
    for metric, name in _METRICS.items():
        match = [r for r in tables if r["metric"] == metric and all(r[k] == str(v) for k, v in query.items())]
        if len(match) > 1:
            values = {name: sorted({r[name] for r in match}) for name in _COLUMNS[:8]}
            text = "; ".join(
                f"{column}: {' | '.join(map(repr, some))}" for column, some in values.items() if len(some) > 1
            )
            raise InputError(f"paper filter {query} finds {len(match)} {metric} values. Narrow it by {text}.")
        if match:
            found[name] = match[0]
    if not found:
        raise InputError(
            f"paper filter {query} finds no ACC or ASR (nor CTCA, SCORE, TIME_S) in the papers' tables. "
            "Compare it with their columns."
        )
    for metric in ("acc", "asr"):
        own = found.get(f"{metric}_after") or next(iter(found.values()))
        same = {name: own[name] for name in _SETTING} | {"defense": "none", "metric": metric.upper()}
        match = [r for r in tables if all(r[name] == value for name, value in same.items())]
        settings = {r["defense_setting"]: r for r in match}  # I-BAU Table 5 repeats the undefended row for each setting
        if before := settings.get("") or settings.get(own["defense_setting"]):
            found[f"{metric}_before"] = before
    return {name: (found[name]["value"], found[name]["std"]) if name in found else ("", "") for name in PRINTED}
