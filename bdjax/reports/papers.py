"""The published numbers: rows of experiments/papers/*.csv, selected by the values of their columns."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdjax.errors import InputError

PRINTED = ("acc_before", "asr_before", "acc_after", "asr_after", "ctca_after", "score", "seconds")
"""Columns of our tables that a paper may print a value for."""
_METRICS = {"ACC": "acc_after", "ASR": "asr_after", "CTCA": "ctca_after", "SCORE": "score", "TIME_S": "seconds"}
_SETTING = ("paper", "table", "dataset", "model", "attack", "attack_setting")
_COLUMNS = (*_SETTING, "defense", "defense_setting", "metric", "value", "std", "note")
_DEFAULT = "experiments/papers"


def read_tables(papers: Path | None) -> list[dict[str, str]]:
    """All rows of the tables in `papers`, or in experiments/papers. Raises InputError when there are none."""
    folders = [Path(papers)] if papers else [Path(__file__).parents[2] / _DEFAULT, Path.cwd() / _DEFAULT]
    for folder in folders:
        rows: list[dict[str, str]] = []
        for path in sorted(folder.glob("*.csv")):
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if missing := set(_COLUMNS) - set(reader.fieldnames or ()):
                    raise InputError(f"{path} lacks the columns {', '.join(sorted(missing))}. Give another --papers.")
                rows += reader
        if rows:
            return rows
    raise InputError(f"no CSV tables of papers in {' or '.join(map(str, folders))}. Say where they are with --papers.")


def published_values(query: Mapping[str, Any], tables: list[dict[str, str]]) -> dict[str, tuple[str, str]]:
    """Look up the values that a paper prints for one setting, and those of the undefended model in the same setting.

    Args:
      query: values by column, which select the rows.
      tables: rows from :func:`read_tables`.

    Returns:
      For each of `PRINTED` the value and its deviation as printed, "" where there is none.

    Raises:
      InputError: when the query names no column, selects no rows, or several of one metric.
    """
    if unknown := set(query) - set(_COLUMNS):
        raise InputError(
            f"paper filter {dict(query)} names no column: {', '.join(unknown)}. Use {', '.join(_COLUMNS)}."
        )
    rows: dict[str, dict[str, str]] = {}
    for metric, name in _METRICS.items():
        matches = [r for r in tables if r["metric"] == metric and all(r[k] == str(v) for k, v in query.items())]
        if len(matches) > 1:
            values = {column: sorted({r[column] for r in matches}) for column in _COLUMNS[:8]}
            text = "; ".join(
                f"{column}: {' | '.join(map(repr, choices))}" for column, choices in values.items() if len(choices) > 1
            )
            raise InputError(f"paper filter {dict(query)} finds {len(matches)} {metric} values. Narrow it by {text}.")
        if matches:
            rows[name] = matches[0]
    if not rows:
        raise InputError(
            f"paper filter {dict(query)} finds no ACC or ASR (nor CTCA, SCORE, TIME_S) in the papers' tables. "
            "Compare it with their columns."
        )
    for metric in ("acc", "asr"):
        defended = rows.get(f"{metric}_after") or next(iter(rows.values()))
        setting = {name: defended[name] for name in _SETTING} | {"defense": "none", "metric": metric.upper()}
        matches = [r for r in tables if all(r[name] == value for name, value in setting.items())]
        by_setting = {r["defense_setting"]: r for r in matches}  # I-BAU Table 5 repeats the undefended row for each
        if undefended := by_setting.get("") or by_setting.get(defended["defense_setting"]):
            rows[f"{metric}_before"] = undefended
    return {name: (rows[name]["value"], rows[name]["std"]) if name in rows else ("", "") for name in PRINTED}
