"""Tables of runs: one run for a terminal; a directory of runs with mean, std and n, beside the papers' numbers."""

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bdjax.reports import _runs, papers, target
from bdjax.reports._runs import NAMES, RATES, Row
from bdjax.text import UNMEASURED

_WIDTH = 160  # of the text, in characters
_LEFT_ALIGNED = ("label", "dataset", "model", "hardware")


def one(result: Mapping[str, Any]) -> str:
    """One run's numbers as text: rates in percent with n, seconds without and of compilation, peak memory."""
    seconds, before, after = result["seconds"], result["before"], result["after"]
    by_trigger = [
        f"{'  ' + label:26s}{100 * rate:9.2f}{100 * after['asr_by_trigger'][label]:9.2f}"
        for label, rate in before.get("asr_by_trigger", {}).items()
    ]
    rows = [
        f"{result['attack']} -> {result['defense']} on {result['dataset']}, {result['model']}, seed {result['seed']}",
        "",
        f"{'':26s}{'before':>9s}{'after':>9s}",
        f"{'clean accuracy, %':26s}{100 * before['acc']:9.2f}{100 * after['acc']:9.2f}   n = {result['n_test']}",
        _asr_line(before["asr"], after["asr"], result["n_asr"]),
        *by_trigger,
        *target.run_lines(result),
        "",
        f"seconds: attack {seconds['attack']:.1f}, defense {seconds['defense']:.1f}, "
        f"compilation {seconds['compile']:.1f}",
        f"peak memory: {result['peak_memory_bytes'] / 2**20:.0f} MiB ({result['peak_memory_of']}), "
        f"{result['env']['device']} x {result['env']['devices']}",
        f"defender's clean images: {result['n_defender']}",
        *_suspect_lines(result.get("rounds", [])),
    ]
    return "\n".join(rows)


def _asr_line(before: float | None, after: float | None, n: int) -> str:
    """The line of the attack success rate, also where it was not measured."""
    if before is None or after is None:
        return f"{'attack success rate, %':26s}   {UNMEASURED}"
    return f"{'attack success rate, %':26s}{100 * before:9.2f}{100 * after:9.2f}   n = {n}"


def _suspect_lines(rounds: list[dict[str, Any]]) -> list[str]:
    """A line with the labels that the defense suspected to be targets in its last round, if it reports them."""
    if not rounds or "suspected" not in rounds[-1]:
        return []
    return [f"suspected target labels: {', '.join(map(str, rounds[-1]['suspected'])) or 'none'}"]


def report(
    directory: Path, form: Literal["text", "csv", "markdown"] = "text", papers_folder: Path | None = None
) -> str:
    """Make a table of the runs below a directory: a row per cell of a sweep, or per configuration without its seed.

    The summaries of sweeps whose files of experiments make one (summary.md) follow it; cells without a defense are in
    these alone.

    Args:
      directory: searched for result.json, and for the cells.json of sweeps, whose unfinished cells get a row, too.
      form: "text" for 160 columns; "markdown"; "csv" with percent in full precision and empty fields for missing ones.
      papers_folder: folder of the papers' CSV tables; default experiments/papers of the checkout or the current
        directory.

    Returns:
      The table.

    Raises:
      InputError: when there is nothing to report, a file is damaged, the results of one cell have different
        configurations, or a paper filter selects no value or several.
    """
    sweeps, runs = _runs.read_directory(Path(directory))
    rows = _runs.group(sweeps, runs)
    tables = papers.read_tables(papers_folder) if any(row.query for row in rows) else []
    for row in rows:
        row.paper = papers.published_values(row.query, tables) if row.query else {}
    if form == "csv":
        return _csv(rows)
    titles = [sweep["title"] for sweep in sweeps.values()]
    notes = _notes(rows, list(sweeps.values()), len(runs) - sum(len(row.runs) for row in rows))
    summaries = [f"\n{(folder / 'summary.md').read_text()}" for folder in sweeps if (folder / "summary.md").is_file()]
    if summaries and not rows:
        return "\n".join([*titles, *summaries])
    return "\n".join([(_markdown if form == "markdown" else _text)(rows, titles, notes), *summaries])


def _fields(row: Row) -> dict[str, Any]:
    """A row as values for CSV: percent in full precision, "" for missing values."""
    fields: dict[str, Any] = {"label": row.label, **dict(zip(NAMES, row.names, strict=True))}
    fields |= {"runs": len(row.runs), "planned": len(row.planned) or ""}
    for name in RATES:
        values = [value for value in row.values(name) if value is not None]
        fields[f"{name}_mean"] = float(np.mean(values)) if values else ""
        fields[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else ""
    fields |= target.fields(list(row.runs.values()))
    fields["n_test"] = max(row.values("n_test"), default="")
    fields["n_asr_min"], fields["n_asr_max"] = (
        min(row.values("n_asr"), default=""),
        max(row.values("n_asr"), default=""),
    )
    fields["seconds_mean"] = float(np.mean(row.values("seconds"))) if row.runs else ""
    fields["peak_memory_mib"] = max(row.values("mib"), default="")
    fields["peak_memory_of"], fields["hardware"] = _distinct(row.values("mib_of")), _distinct(row.values("hardware"))
    for name in papers.PRINTED:
        fields[f"paper_{name}"], fields[f"paper_{name}_std"] = row.paper.get(name, ("", ""))
    return {**fields, "scale": row.scale}


def _strings(row: Row) -> dict[str, str]:
    """A row as texts for the other tables."""
    fields = _fields(row)
    published = {f"paper_{name}": _pair(*row.paper.get(name, ("", ""))) for name in papers.PRINTED}
    label = f"{row.label} *" if row.scale else row.label
    names = {"label": label, "dataset": row.names[2], "model": row.names[3], "runs": row.count(), **published}
    if not row.runs:
        return names | dict.fromkeys([*RATES, "n_test", "n_asr", "seconds", "mib", "hardware"], "missing")
    return names | {
        **{name: _rate(fields[f"{name}_mean"], fields[f"{name}_std"]) for name in RATES},
        **target.strings(fields),
        "n_test": str(fields["n_test"]),
        "n_asr": "-".join(map(str, sorted({fields["n_asr_min"], fields["n_asr_max"]}))),
        "seconds": f"{fields['seconds_mean']:.1f}",
        "mib": f"{fields['peak_memory_mib']:.0f}",
        "hardware": fields["hardware"],
    }


def _rate(mean: float | str, std: float | str) -> str:
    """A rate with its deviation; "" stands for a missing value."""
    return _pair(*(f"{v:.2f}" for v in (mean, std) if v != "")) if mean != "" else "not measured"


def _pair(mean: str, std: str = "") -> str:
    return f"{mean} ± {std}" if std else mean


def _distinct(values: Iterable[str]) -> str:
    """The different values with commas between them."""
    return ", ".join(dict.fromkeys(values))


def _notes(rows: list[Row], sweeps: list[dict[str, Any]], duplicates: int) -> list[str]:
    """Sentences below the table: scales, definitions, missing values, and how the numbers were made."""
    notes = [f"* {row.label}: {row.scale}" for row in rows if row.scale]
    runs = [run for row in rows for run in row.runs.values()]
    tests = ", ".join(str(n) for n in sorted({run["n_test"] for run in runs}))
    notes += [
        "Rates in percent: mean ± sample standard deviation over runs with different seeds; a single run has no ±.",
        f"n test = {tests or 'none yet'}: clean test images for ACC. n ASR: triggered images for ASR, without those "
        "that are of the target class already; 'incl. target' counts them, too, as I-BAU's papers do.",
        "s: mean seconds of the defense without compilation. MiB: highest peak memory"
        f"{' of the ' * bool(runs)}{_distinct(run['mib_of'] for run in runs)}.",
    ]
    if any(run[name] is not None for run in runs for name in target.COLUMNS):
        notes.append(
            "CTCA: accuracy on clean images of the attack's target. SCORE: (1 - ASR after / ASR before) ACC after / "
            "ACC of a model trained without poison, in percent."
        )
    if verdicts := [run["verdict"] for run in runs if run["verdict"]]:
        notes.append(target.note(verdicts))
    if any(run["asr_after"] is None for run in runs):
        notes.append(f"ASR {UNMEASURED}.")
    if any(row.paper for row in rows):
        notes.append("paper: as printed in the paper (experiments/papers); empty where the paper prints nothing.")
    if any(not row.runs for row in rows):
        notes.append("missing: planned, but there is no result yet.")
    if duplicates:
        notes.append(f"Not counted: {duplicates} result.json with the configuration and seed of another one.")
    notes += [f"Made by: {sweep['command']}" for sweep in sweeps]
    return [*notes, *([f"Software: {_distinct(run['software'] for run in runs)}"] if runs else [])]


def _text(rows: list[Row], titles: list[str], notes: list[str]) -> str:
    """The table for a terminal; results beside ACC and ASR are in a second table."""
    headings = [heading.split(", ") for heading, *_ in RATES.values()]
    blocks = [[["cell", "  dataset, model"], ["runs"], *headings, ["n test", "n ASR"], ["s", "MiB"], ["hardware"]]]
    strings = list(map(_strings, rows))
    for s in strings:
        rates = [[s[name], s.get(f"paper_{name}", "")] for name in RATES]
        count = [s["runs"], "paper" if any(s[f"paper_{name}"] for name in RATES if name in papers.PRINTED) else ""]
        hardware = textwrap.wrap(s["hardware"], 20)
        cell = [s["label"], f"  {s['dataset']}, {s['model']}"]
        blocks.append([cell, count, *rates, [s["n_test"], s["n_asr"]], [s["seconds"], s["mib"]], hardware])
    lines = _grid(blocks)
    if more := target.headings(strings):
        published = {n: f"paper's {h}" for n, h in target.COLUMNS.items() if any(s.get(f"paper_{n}") for s in strings)}
        columns = more | {f"paper_{n}": h for n, h in published.items()}
        blocks = [[["cell"], *([heading] for heading in columns.values())]]
        names = [*more, *(f"paper_{name}" for name in published)]
        blocks += [[[s["label"]], *([s.get(name, "missing")] for name in names)] for s in strings]
        lines += _grid(blocks)
    wrapped = [textwrap.fill(note, _WIDTH, subsequent_indent="  ") for note in notes]
    return "\n".join([*(f"{title}\n" for title in titles), *lines, *wrapped])


def _grid(blocks: list[list[list[str]]]) -> list[str]:
    """Lines of a table. A block is a row of cells and a cell is a list of lines; the first block is the heading."""
    widths = [max(len(line) for block in blocks for line in block[i]) for i in range(len(blocks[0]))]
    widths[0] = min(widths[0], max(24, _WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for block in blocks:
        block[0] = [part for line in block[0] for part in textwrap.wrap(line, widths[0], subsequent_indent="  ")]
        for parts in zip_longest(*block, fillvalue=""):
            lines.append("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
        lines.append("-" * (sum(widths) + 2 * len(widths[1:])) if block is blocks[0] else "")
    return lines


def _markdown(rows: list[Row], titles: list[str], notes: list[str]) -> str:
    """The table and its notes as Markdown."""
    columns = {"label": "cell", "dataset": "dataset", "model": "model", "runs": "runs"}
    strings = list(map(_strings, rows))
    rate_headings = {name: heading for name, (heading, *_) in RATES.items()}
    columns |= rate_headings | target.headings(strings)
    columns |= {"n_test": "n test", "n_asr": "n ASR", "seconds": "s", "mib": "MiB", "hardware": "hardware"}
    if any(row.paper for row in rows):
        headings = rate_headings | {**target.COLUMNS, "seconds": "s"}
        published = [n for n in papers.PRINTED if n in RATES or any(s[f"paper_{n}"] for s in strings)]
        columns |= {f"paper_{name}": f"paper's {headings[name]}" for name in published}
    lines = [list(columns.values()), [":--" if name in _LEFT_ALIGNED else "--:" for name in columns]]
    lines += [[s.get(name, "missing").replace("|", "\\|").replace("*", "\\*") for name in columns] for s in strings]
    table = [f"| {' | '.join(line)} |" for line in lines]
    items = ["- " + note.replace("*", "\\*") for note in notes]
    return "\n".join([*(f"**{title}**\n" for title in titles), *table, "", *items])


def _csv(rows: list[Row]) -> str:
    """The table as comma-separated values."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(_fields(Row([""] * 4, ""))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_fields, rows))
    return out.getvalue().removesuffix("\n")
