"""Write the leaderboard: index.html, records.csv and records.parquet.

The page loads nothing. Its script, which sorts and filters, is named by its hash in the page's security policy, so that
no other script runs. What it shows is in templates/leaderboard.html, .css and .js; this module prepares the values.
"""

import base64
import csv
import hashlib
import io
import os
import shutil
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bdjax import __version__
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.io.files import remove_symlink
from bdjax.reports._html import render
from bdjax.reports.leaderboard import plot
from bdjax.reports.leaderboard.records import Record
from bdjax.reports.leaderboard.rows import DefenseRow, Row, by_defense, group, scales

_RATES = {
    "acc_before": "ACC before", "acc_after": "ACC after", "asr_before": "ASR before", "asr_after": "ASR after",
    "der": "DER", "r_asr": "R-ASR", "q_asr": "Q-ASR", "estimate": "estimate",
}  # fmt: skip
_FILTERS = {"attack": "attack", "dataset": "data set", "model": "model", "n_defender": "n", "defense": "defense"}
"""Columns that rows are filtered by, with their names."""
_NEEDED = {"acc_before", "acc_after", "asr_before", "asr_after", "der"}
"""Columns that are there even when they are empty."""


_GENERATOR = "bdjax leaderboard"
"""Written into the page, so that no other page is replaced."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table."""

    column: str
    text: str
    value: float | str = ""
    """What the column is sorted by; "" goes last."""
    note: int = 0
    """Number of the note on a smaller scale."""
    links: tuple[tuple[str, str], ...] = ()
    """Texts and addresses."""


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    heading: str
    numeric: bool


def write(records: Sequence[Record], out: Path, title: str = "Backdoor defenses", copy: bool = False) -> list[Path]:
    """Write the page and the records.

    Args:
      records: from :func:`bdjax.reports.leaderboard.records.read`.
      out: folder of the site.
      title: heading of the page.
      copy: copy the files that the records were read from into OUT/results, so that the folder can be moved.

    Returns:
      The files: index.html, records.csv and, with pyarrow, records.parquet.

    Raises:
      InputError: OUT holds a page that is no leaderboard.
    """
    _check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    links = _links(records, out, copy)
    table = [{**record.values(), "source": links[record.source][0]} for record in records]
    checkpoint.write_text(out / "records.csv", _csv(table))
    files = [out / "records.csv", *_parquet(table, out / "records.parquet")]
    rows = group(records)
    defenses = by_defense(rows)
    notes = scales(rows)
    columns = _columns(rows)
    script = render("leaderboard.js", {})
    values = {
        "title": title,
        "generator": _GENERATOR,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "files": [file.name for file in files],
        "n_records": len(records),
        "n_rows": len(rows),
        "n_victims": len({(r.first.victim, r.first.attack, r.first.dataset, r.first.model) for r in rows}),
        "defenses": [_defense_cells(row) for row in defenses],
        "plots": plot.plots(rows, defenses),
        "size": (plot.WIDTH, plot.HEIGHT),
        "columns": columns,
        "rows": [_table_row(row, columns, notes, links) for row in rows],
        "filters": [(name, label, _choices(rows, name)) for name, label in _FILTERS.items()],
        "scales": sorted(notes.items(), key=lambda item: item[1]),
        "hardware": sorted({r.device for r in records if r.device}),
        "software": sorted({f"bdjax {r.bdjax}, jax {r.jax}" for r in records if r.bdjax}),
        "has_papers": any(record.paper for record in records),
        "version": __version__,
    }
    checkpoint.write_text(out / "index.html", render("leaderboard.html", values))
    return [out / "index.html", *files]


def _check_folder(out: Path) -> None:
    """Raise InputError when a folder has an index.html that is no leaderboard."""
    page = out / "index.html"
    if page.exists() and f'<meta name="generator" content="{_GENERATOR}">' not in page.read_text(errors="replace"):
        raise InputError(f"{page} is not a page of bdjax leaderboard and would be replaced. Choose another --out.")


def _links(records: Sequence[Record], out: Path, copy: bool) -> dict[Path, tuple[str, str]]:
    """For each source its path relative to the site, and the same as an address."""
    sources = list(dict.fromkeys(record.source for record in records))
    paths = {source: os.path.relpath(source, out) for source in sources}
    if copy:
        (out / "results").mkdir(exist_ok=True)
        for number, source in enumerate(sources):
            paths[source] = f"results/{number}-{source.name}"
            shutil.copyfile(source, remove_symlink(out / paths[source]))
    return {source: (path, quote(Path(path).as_posix(), safe="/")) for source, path in paths.items()}


def _columns(rows: Sequence[Row]) -> list[Column]:
    """The columns in which some row has a value."""
    columns = [Column("defense", "defense", False)]
    columns += [Column("victim", "victim", False)] * any(row.first.victim for row in rows)
    columns += [Column(name, _FILTERS[name], False) for name in ("attack", "dataset", "model")]
    columns.append(Column("n_defender", "n", True))
    columns += [
        Column(name, heading, True)
        for name, heading in _RATES.items()
        if name in _NEEDED or any(row.mean(name) is not None for row in rows)
    ]
    columns += [Column("seconds", "seconds", True), Column("peak_memory_mib", "MiB", True)]
    columns += [Column("setting", "cell, setting", False)] * any(row.setting for row in rows)
    columns += [Column("paper", "papers, ACC / ASR", False)] * any(row.first.paper for row in rows)
    return [*columns, Column("n_test", "n test", True), Column("records", "records", True)]


def _table_row(
    row: Row, columns: Sequence[Column], notes: Mapping[str, int], links: Mapping[Path, tuple[str, str]]
) -> dict[str, Any]:
    """A row of the table: attributes for the filters, cells, and what the script averages."""
    cells = [_cell(row, column, notes, links) for column in columns]
    return {"filters": {name: getattr(row.first, name) for name in _FILTERS}, "change": row.acc_change, "cells": cells}


def _cell(row: Row, column: Column, notes: Mapping[str, int], links: Mapping[Path, tuple[str, str]]) -> Cell:
    name, first = column.name, row.first
    if name == "defense":
        return Cell(name, first.defense, first.defense, notes.get(first.scale, 0))
    if name == "setting":
        return Cell(name, row.setting or "–", row.setting)
    if name == "records":
        seeds = tuple((f"seed {record.seed}", links[record.source][1]) for record in row.records)
        return Cell(name, "", len(seeds), links=seeds)
    if name == "n_test":
        largest = max(record.n_test for record in row.records)
        triggered = max(record.n_asr for record in row.records)
        return Cell(name, f"{largest}, {triggered}", largest)
    if not column.numeric:
        text = str(getattr(first, name))
        return Cell(name, text or "–", text)
    mean, deviation = row.mean(name), row.deviation(name)
    if mean is None:
        return Cell(name, "–")
    if name == "seconds":
        return Cell(name, _seconds(mean), round(mean, 6))
    digits = 1 if name in _RATES else 0
    spread = f" ± {deviation:.{digits}f}" if deviation is not None and digits else ""
    return Cell(name, f"{mean:.{digits}f}{spread}", round(mean, 6))


def _seconds(value: float) -> str:
    """Seconds with a digit behind the point below 100, and two digits below 1."""
    return f"{value:.2g}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _defense_cells(row: DefenseRow) -> list[Cell]:
    """A row of the table of defenses; the script writes the numbers anew for the rows that are shown."""
    return [
        Cell("number", str(row.number)), Cell("defense", row.defense), Cell("der", f"{row.der:.1f}"),
        Cell("asr_after", f"{row.asr_after:.1f}"), Cell("acc_change", f"{row.acc_change:+.1f}"),
        Cell("seconds", _seconds(row.seconds)),
        Cell("memory", "–" if row.memory is None else f"{row.memory:.0f}"), Cell("n_rows", str(row.n_rows)),
    ]  # fmt: skip


def _choices(rows: Sequence[Row], name: str) -> list[Any]:
    """The distinct values of a column in order; numbers by size."""
    return sorted({getattr(row.first, name) for row in rows if getattr(row.first, name) != ""})


def _csv(table: Sequence[Mapping[str, Any]]) -> str:
    """The records as comma-separated values; an empty field where nothing was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _parquet(table: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Write the records as Parquet, if pyarrow is installed; return the path."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return []
    kinds = {int: pyarrow.int64(), str: pyarrow.string(), Path: pyarrow.string()}
    hints = typing.get_type_hints(Record)
    fields = [
        (name, kinds.get(hints[name], pyarrow.float64()) if name != "config" else kinds[str]) for name in table[0]
    ]
    columns = {name: [row[name] for row in table] for name in table[0]}
    parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(fields)), remove_symlink(path))
    return [path]
