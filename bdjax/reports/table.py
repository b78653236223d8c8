"""Tables: one run for a terminal; a directory of runs as mean, std and n beside the papers' numbers."""

import csv
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bdjax.errors import InputError
from bdjax.io import records
from bdjax.io.files import read_record
from bdjax.reports import papers as papers_
from bdjax.reports import target as target_
from bdjax.text import UNMEASURED

_RATES = {  # column -> heading and place in a result
    "acc_before": ("ACC before", "before", "acc"),
    "asr_before": ("ASR before", "before", "asr"),
    "acc_after": ("ACC after", "after", "acc"),
    "asr_after": ("ASR after", "after", "asr"),
    "asr_after_incl_target": ("ASR after, incl. target", "after", "asr_with_target"),
}
_NAMES = ("attack", "defense", "dataset", "model")
_WIDTH = 160  # of the text
_LEFT = ("label", "dataset", "model", "hardware")


@dataclass
class _Row:
    names: list[str]
    label: str
    scale: str = ""
    query: dict[str, Any] | None = None  # which rows of the papers' tables belong to it
    planned: set[int] = field(default_factory=set)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    paper: dict[str, tuple[str, str]] = field(default_factory=dict)  # column -> value and std as printed

    def all(self, name: str) -> list[Any]:
        return [run[name] for run in self.runs.values()]

    def count(self) -> str:
        seeds = self.planned | set(self.all("seed"))
        return f"{len(self.runs)}/{len(seeds)}" if len(self.runs) < len(seeds) else str(len(self.runs))


def one(result: dict[str, Any]) -> str:
    """A run's numbers for a terminal: rates in percent, n, seconds with compilation apart, peak memory."""
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
        _asr(before["asr"], after["asr"], result["n_asr"]),
        *by_trigger,
        *target_.one(result),
        "",
        f"seconds: attack {seconds['attack']:.1f}, defense {seconds['defense']:.1f}, "
        f"compilation {seconds['compile']:.1f}",
        f"peak memory: {result['peak_memory_bytes'] / 2**20:.0f} MiB ({result['peak_memory_of']}), "
        f"{result['env']['device']} x {result['env']['devices']}",
        f"defender's clean images: {result['n_defender']}",
        *_suspects(result.get("rounds", [])),
    ]
    return "\n".join(rows)


def _asr(before: float | None, after: float | None, n: int) -> str:
    if before is None or after is None:
        return f"{'attack success rate, %':26s}   {UNMEASURED}"
    return f"{'attack success rate, %':26s}{100 * before:9.2f}{100 * after:9.2f}   n = {n}"


def _suspects(rounds: list[dict[str, Any]]) -> list[str]:
    """A line on the labels that the defense took for targets in the end, if it says."""
    if not rounds or "suspected" not in rounds[-1]:
        return []
    return [f"suspected target labels: {', '.join(map(str, rounds[-1]['suspected'])) or 'none'}"]


def report(directory: Path, form: Literal["text", "csv", "markdown"] = "text", papers: Path | None = None) -> str:
    """The runs below `directory` as a table: a row per cell of a sweep, or per configuration without its seed.

    Args:
      directory: searched for result.json, and for the cells.json of sweeps, whose unfinished cells get a row too.
      form: text for 160 columns; markdown; csv with percent in full precision and empty fields for what is missing.
      papers: folder of the papers' CSV tables; default experiments/papers of the checkout or the current directory.

    Raises:
      InputError: nothing to report, a damaged file, one cell with results of several configurations, or a paper
        filter that finds no value or several.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no such directory: {directory}. Give the --out of a sweep, or a folder with runs.")
    sweeps = {path.parent: _read(path, _sweep) for path in sorted(directory.rglob("cells.json"))}
    read = {path: _read(path, _run) for path in sorted(directory.rglob("result.json"))}
    runs = {path: run for path, run in read.items() if run}
    if not runs and not sweeps:
        raise InputError(f"{directory} holds no result.json and no cells.json. Run `bdjax sweep` or `bdjax run` first.")
    rows = _rows(sweeps, runs)
    tables = papers_.read(papers) if any(row.query for row in rows) else []
    for row in rows:
        row.paper = papers_.printed(row.query, tables) if row.query else {}
    if form == "csv":
        return _csv(rows)
    titles = [sweep["title"] for sweep in sweeps.values()]
    notes = _notes(rows, list(sweeps.values()), len(runs) - sum(len(row.runs) for row in rows))
    return (_markdown if form == "markdown" else _text)(rows, titles, notes)


def _read(path: Path, parse: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    with records.reading_record(path):
        return parse(records.make_visible(read_record(path)))


def _sweep(value: Any) -> dict[str, Any]:
    rows = {}
    for cell in value["cells"]:
        index, label, scale, query = _cell(cell)
        names, seeds = [str(cell[name]) for name in _NAMES], {int(seed) for seed in cell["seeds"]}
        rows[index, label, scale] = _Row(names, label, scale, query, seeds)
    return {"file": str(value["file"]), "title": str(value["title"]), "rows": rows}


def _run(value: Any) -> dict[str, Any]:
    """What the tables need of a result.json, flat; rates in percent. Nothing of what is no run's, and says so."""
    if value.get("kind"):
        return {}
    parts = {"attack": "attack_config", "defense": "defense_config", "fit": "fit", "split": "split"}
    config = {f"{part}.{name}": field for part, key in parts.items() for name, field in value[key].items()}
    config |= {name: int(value[name]) for name in ("n_test", "n_defender")}
    names, env = [str(value[name]) for name in _NAMES], value["env"]
    rates = [(name, value[phase][key]) for name, (_, phase, key) in _RATES.items()]
    return {
        **{name: None if rate is None else 100 * _finite(rate) for name, rate in rates},
        **target_.read(value),
        "names": names,
        "config": config,  # all that decides the numbers but the seed, named as the command line's flags
        "key": json.dumps([names, config], sort_keys=True),
        "hash": str(value["config_hash"]),
        "cell": _cell(value["cell"]) if value.get("cell") else None,
        "seed": int(value["seed"]),
        "n_test": int(value["n_test"]),
        "n_asr": int(value["n_asr"]),
        "seconds": _finite(value["seconds"]["defense"]),
        "mib": _finite(value["peak_memory_bytes"]) / 2**20,
        "mib_of": str(value["peak_memory_of"]),
        "hardware": f"{env['device']} x {env['devices']}",
        "software": f"bdjax {env.get('bdjax')} ({str(env.get('commit'))[:12]}), jax {env.get('jax')}",
    }


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is no finite number")
    return number


def _cell(cell: Any) -> tuple[int, str, str, dict[str, Any] | None]:
    return int(cell["index"]), str(cell["label"]), str(cell.get("scale") or ""), dict(cell.get("paper") or {}) or None


def _rows(sweeps: dict[Path, Any], runs: dict[Path, Any]) -> list[_Row]:
    rows: dict[Any, _Row] = {(home, *key): row for home, sweep in sweeps.items() for key, row in sweep["rows"].items()}
    planned = list(rows)
    for path, run in runs.items():
        run["path"], home = path, next((parent for parent in path.parents if parent in sweeps), None)
        key, label, scale, query = run["key"], " -> ".join(run["names"][:2]), "", None
        if run["cell"]:
            index, label, scale, query = run["cell"]
            key = (home, index, label, scale)
            alike = [k for k in planned if (k[0], *k[2:]) == (home, label, scale)]
            key = alike[0] if key not in rows and len(alike) == 1 else key  # the cells were put in another order
            label += " (not in cells.json)" if home and key not in rows else ""
        row = rows.setdefault(key, _Row(run["names"], label, scale, query))
        first = next(iter(row.runs.values()), run)
        if first["key"] != run["key"]:
            raise InputError(
                f"{first['path']} and {path} are of one cell ({label!r}) but differ in "
                f"{', '.join(_differ([run['config'], first['config']]) or _NAMES)}. "
                "Remove the outdated results, or sweep into another --out."
            )
        row.names = run["names"]
        row.runs.setdefault(run["hash"], run)
    loose = [row for key, row in rows.items() if isinstance(key, str)]
    for row in loose:  # several configurations of one name are told apart by what differs
        own = row.all("config")[0]
        others = [other.all("config")[0] for other in loose if other.names == row.names]
        if differ := _differ([own, *others]):
            row.label += f" ({', '.join(f'{name}={own.get(name)}' for name in differ)})"
    return list(rows.values())


def _differ(configs: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if any(other.get(name) != configs[0].get(name) for other in configs)]


def _fields(row: _Row) -> dict[str, Any]:
    """A row for a program: percent in full precision, "" for what is not there."""
    fields: dict[str, Any] = {"label": row.label, **dict(zip(_NAMES, row.names, strict=True))}
    fields |= {"runs": len(row.runs), "planned": len(row.planned) or ""}
    for name in _RATES:
        values = [value for value in row.all(name) if value is not None]
        fields[f"{name}_mean"] = float(np.mean(values)) if values else ""
        fields[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else ""
    fields |= target_.fields(list(row.runs.values()))
    fields["n_test"] = max(row.all("n_test"), default="")
    fields["n_asr_min"], fields["n_asr_max"] = min(row.all("n_asr"), default=""), max(row.all("n_asr"), default="")
    fields["seconds_mean"] = float(np.mean(row.all("seconds"))) if row.runs else ""
    fields["peak_memory_mib"] = max(row.all("mib"), default="")
    fields["peak_memory_of"], fields["hardware"] = _some(row.all("mib_of")), _some(row.all("hardware"))
    for name in papers_.PRINTED:
        fields[f"paper_{name}"], fields[f"paper_{name}_std"] = row.paper.get(name, ("", ""))
    return {**fields, "scale": row.scale}


def _strings(row: _Row) -> dict[str, str]:
    """A row for a person."""
    f = _fields(row)
    printed = {f"paper_{name}": _pair(*row.paper.get(name, ("", ""))) for name in papers_.PRINTED}
    label = f"{row.label} *" if row.scale else row.label
    names = {"label": label, "dataset": row.names[2], "model": row.names[3], "runs": row.count(), **printed}
    if not row.runs:
        return names | dict.fromkeys([*_RATES, "n_test", "n_asr", "seconds", "mib", "hardware"], "missing")
    return names | {
        **{name: _rate(f[f"{name}_mean"], f[f"{name}_std"]) for name in _RATES},
        **target_.strings(f),
        "n_test": str(f["n_test"]),
        "n_asr": "-".join(map(str, sorted({f["n_asr_min"], f["n_asr_max"]}))),
        "seconds": f"{f['seconds_mean']:.1f}",
        "mib": f"{f['peak_memory_mib']:.0f}",
        "hardware": f["hardware"],
    }


def _rate(mean: float | str, std: float | str) -> str:
    return _pair(*(f"{v:.2f}" for v in (mean, std) if v != "")) if mean != "" else "not measured"


def _pair(mean: str, std: str = "") -> str:
    return f"{mean} ± {std}" if std else mean


def _some(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _notes(rows: list[_Row], sweeps: list[dict[str, Any]], twice: int) -> list[str]:
    notes = [f"* {row.label}: {row.scale}" for row in rows if row.scale]
    runs = [run for row in rows for run in row.runs.values()]
    tests = ", ".join(str(n) for n in sorted({run["n_test"] for run in runs}))
    notes += [
        "Rates in percent: mean ± sample standard deviation over runs of different seeds; one run has no ±.",
        f"n test = {tests or 'none yet'}: clean test images behind ACC. n ASR: triggered ones behind ASR, which leaves "
        "out images already of the target class; 'incl. target' counts them, as I-BAU's papers do.",
        "s: mean seconds of the defense without compilation. MiB: highest peak memory"
        f"{' of the ' * bool(runs)}{_some(run['mib_of'] for run in runs)}.",
    ]
    if any(run[name] is not None for run in runs for name in target_.COLUMNS):
        notes.append(
            "CTCA: accuracy on clean images of the attack's target. SCORE: (1 - ASR after / ASR before) ACC after / "
            "ACC of a model trained without poison, in percent."
        )
    if verdicts := [run["verdict"] for run in runs if run["verdict"]]:
        notes.append(target_.note(verdicts))
    if any(run["asr_after"] is None for run in runs):
        notes.append(f"ASR {UNMEASURED}.")
    if any(row.paper for row in rows):
        notes.append("paper: as printed there (experiments/papers); empty where nothing is printed.")
    if any(not row.runs for row in rows):
        notes.append("missing: planned, without a result yet.")
    if twice:
        notes.append(f"{twice} result.json of a run that is here already (same configuration and seed) not counted.")
    for sweep in sweeps:
        seeds = ",".join(map(str, sorted(set().union(*(row.planned for row in sweep["rows"].values())))))
        notes.append(f"Made by: bdjax sweep {sweep['file']} --seeds {seeds}")
    return [*notes, *([f"Software: {_some(run['software'] for run in runs)}"] if runs else [])]


def _text(rows: list[_Row], titles: list[str], notes: list[str]) -> str:
    headings = [heading.split(", ") for heading, *_ in _RATES.values()]
    blocks = [[["cell", "  dataset, model"], ["runs"], *headings, ["n test", "n ASR"], ["s", "MiB"], ["hardware"]]]
    shown = list(map(_strings, rows))
    for s in shown:
        rates = [[s[name], s.get(f"paper_{name}", "")] for name in _RATES]
        count = [s["runs"], "paper" if any(s[f"paper_{name}"] for name in _RATES if name in papers_.PRINTED) else ""]
        hardware = textwrap.wrap(s["hardware"], 20)
        cell = [s["label"], f"  {s['dataset']}, {s['model']}"]
        blocks.append([cell, count, *rates, [s["n_test"], s["n_asr"]], [s["seconds"], s["mib"]], hardware])
    lines = _grid(blocks)
    if more := target_.headings(shown):
        printed = {n: f"paper's {h}" for n, h in target_.COLUMNS.items() if any(s.get(f"paper_{n}") for s in shown)}
        columns = more | {f"paper_{n}": h for n, h in printed.items()}
        blocks = [[["cell"], *([heading] for heading in columns.values())]]
        names = [*more, *(f"paper_{name}" for name in printed)]
        blocks += [[[s["label"]], *([s.get(name, "missing")] for name in names)] for s in shown]
        lines += _grid(blocks)
    wrapped = [textwrap.fill(note, _WIDTH, subsequent_indent="  ") for note in notes]
    return "\n".join([*(f"{title}\n" for title in titles), *lines, *wrapped])


def _grid(blocks: list[list[list[str]]]) -> list[str]:
    """Lines of a table; a block is a row of cells, a cell a list of lines, and the first block the heading."""
    widths = [max(len(line) for block in blocks for line in block[i]) for i in range(len(blocks[0]))]
    widths[0] = min(widths[0], max(24, _WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for block in blocks:
        block[0] = [part for line in block[0] for part in textwrap.wrap(line, widths[0], subsequent_indent="  ")]
        for parts in zip_longest(*block, fillvalue=""):
            lines.append("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
        lines.append("-" * (sum(widths) + 2 * len(widths[1:])) if block is blocks[0] else "")
    return lines


def _markdown(rows: list[_Row], titles: list[str], notes: list[str]) -> str:
    columns = {"label": "cell", "dataset": "dataset", "model": "model", "runs": "runs"}
    shown = list(map(_strings, rows))
    known = {name: heading for name, (heading, *_) in _RATES.items()}
    columns |= known | target_.headings(shown)
    columns |= {"n_test": "n test", "n_asr": "n ASR", "seconds": "s", "mib": "MiB", "hardware": "hardware"}
    if any(row.paper for row in rows):
        known |= {**target_.COLUMNS, "seconds": "s"}
        used = [n for n in papers_.PRINTED if n in _RATES or any(s[f"paper_{n}"] for s in shown)]
        columns |= {f"paper_{name}": f"paper's {known[name]}" for name in used}
    lines = [list(columns.values()), [":--" if name in _LEFT else "--:" for name in columns]]
    lines += [[s.get(name, "missing").replace("|", "\\|").replace("*", "\\*") for name in columns] for s in shown]
    table = [f"| {' | '.join(line)} |" for line in lines]
    marked = ["- " + note.replace("*", "\\*") for note in notes]
    return "\n".join([*(f"**{title}**\n" for title in titles), *table, "", *marked])


def _csv(rows: list[_Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(_fields(_Row([""] * 4, ""))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_fields, rows))
    return out.getvalue().removesuffix("\n")
