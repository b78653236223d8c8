"""The rows of the table of runs: results below a directory, grouped by cell of a sweep or by configuration."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdjax.errors import InputError
from bdjax.io import records
from bdjax.io.files import read_record
from bdjax.reports import target

RATES = {
    "acc_before": ("ACC before", "before", "acc"),
    "asr_before": ("ASR before", "before", "asr"),
    "acc_after": ("ACC after", "after", "acc"),
    "asr_after": ("ASR after", "after", "asr"),
    "asr_after_incl_target": ("ASR after, incl. target", "after", "asr_with_target"),
}
"""By column of the table: heading, and where the rate is in a result."""
NAMES = ("attack", "defense", "dataset", "model")


@dataclass
class Row:
    """The runs of one cell of a sweep, or of one configuration, which differ in their seed."""

    names: list[str]
    """Attack, defense, data set and model."""
    label: str
    scale: str = ""
    """How the cell is smaller than the published one; "" for full size."""
    query: dict[str, Any] | None = None
    """Column values that select the published numbers; None: there are none."""
    planned: set[int] = field(default_factory=set)
    """Seeds of the sweep."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results from `_run`, by the hash of their configuration."""
    paper: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Column -> published value and deviation, as printed."""

    def values(self, name: str) -> list[Any]:
        """One field of all runs."""
        return [run[name] for run in self.runs.values()]

    def count(self) -> str:
        """The number of runs, with the number of seeds where some have no run."""
        seeds = self.planned | set(self.values("seed"))
        return f"{len(self.runs)}/{len(seeds)}" if len(self.runs) < len(seeds) else str(len(self.runs))


def read_directory(directory: Path) -> tuple[dict[Path, dict[str, Any]], dict[Path, dict[str, Any]]]:
    """Read the plans and results below a directory.

    Returns:
      The sweeps ("command", "title", "rows") by folder, and the runs by the path of their result.json.

    Raises:
      InputError: when the directory does not exist or holds neither, and for a damaged file.
    """
    if not directory.is_dir():
        raise InputError(f"no such directory: {directory}. Give the --out of a sweep, or a folder with runs.")
    sweeps = {path.parent: _read(path, _sweep) for path in sorted(directory.rglob("cells.json"))}
    results = {path: _read(path, _run) for path in sorted(directory.rglob("result.json"))}
    runs = {path: run for path, run in results.items() if run}
    if not runs and not sweeps:
        raise InputError(f"{directory} holds no result.json and no cells.json. Run `bdjax sweep` or `bdjax run` first.")
    return sweeps, runs


def group(sweeps: dict[Path, Any], runs: dict[Path, Any]) -> list[Row]:
    """Group runs into rows: planned cells first, then cells and configurations that no plan has.

    Args:
      sweeps: by folder, from :func:`read_directory`.
      runs: by path, from :func:`read_directory`.

    Returns:
      The rows. A cell without a finished run has a row, too; copies of one run count once.

    Raises:
      InputError: when results of one cell have different configurations.
    """
    rows: dict[Any, Row] = {
        (folder, *key): row for folder, sweep in sweeps.items() for key, row in sweep["rows"].items()
    }
    planned = list(rows)
    for path, run in runs.items():
        run["path"], folder = path, next((parent for parent in path.parents if parent in sweeps), None)
        key, label, scale, query = run["key"], " -> ".join(run["names"][:2]), "", None
        if run["cell"]:
            index, label, scale, query = run["cell"]
            key = (folder, index, label, scale)
            same_cell = [k for k in planned if (k[0], *k[2:]) == (folder, label, scale)]
            if key not in rows and len(same_cell) == 1:
                key = same_cell[0]  # the cells of the plan were reordered
            label += " (not in cells.json)" if folder and key not in rows else ""
        row = rows.setdefault(key, Row(run["names"], label, scale, query))
        first = next(iter(row.runs.values()), run)
        if first["key"] != run["key"]:
            raise InputError(
                f"{first['path']} and {path} are of one cell ({label!r}) but differ in "
                f"{', '.join(_differences([run['config'], first['config']]) or NAMES)}. "
                "Remove the outdated results, or sweep into another --out."
            )
        row.names = run["names"]
        row.runs.setdefault(run["hash"], run)
    _extend_labels([row for key, row in rows.items() if isinstance(key, str)])
    return list(rows.values())


def _extend_labels(rows: list[Row]) -> None:
    """Add to the labels of rows with the same names the settings in which they differ."""
    for row in rows:
        config = row.values("config")[0]
        others = [other.values("config")[0] for other in rows if other.names == row.names]
        if differences := _differences([config, *others]):
            row.label += f" ({', '.join(f'{name}={config.get(name)}' for name in differences)})"


def _differences(configs: list[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all configurations."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if any(other.get(name) != configs[0].get(name) for other in configs)]


def _read(path: Path, parse: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    with records.reading_record(path):
        return parse(records.make_visible(read_record(path)))


def _sweep(value: Any) -> dict[str, Any]:
    """Command, title and rows of a cells.json; its cells without a defense are in the sweep's own summary."""
    rows, seeds = {}, sorted({int(seed) for cell in value["cells"] for seed in cell["seeds"]})
    for cell in value["cells"]:
        if cell["defense"] is None:
            continue
        index, label, scale, query = _cell(cell)
        names, planned = [str(cell[name]) for name in NAMES], {int(seed) for seed in cell["seeds"]}
        rows[index, label, scale] = Row(names, label, scale, query, planned)
    command = value.get("command") or f"bdjax sweep {value['file']} --seeds {','.join(map(str, seeds))}"
    return {"command": str(command), "title": str(value["title"]), "rows": rows}


def _run(value: Any) -> dict[str, Any]:
    """The fields of a result.json that the table needs, with rates in percent; {} for a result that is no run's."""
    if value.get("kind"):
        return {}
    parts = {"attack": "attack_config", "defense": "defense_config", "fit": "fit", "split": "split"}
    config = {f"{part}.{name}": setting for part, key in parts.items() for name, setting in value[key].items()}
    config |= {name: int(value[name]) for name in ("n_test", "n_defender")}
    names, env = [str(value[name]) for name in NAMES], value["env"]
    rates = [(name, value[phase][key]) for name, (_, phase, key) in RATES.items()]
    return {
        **{name: None if rate is None else 100 * _finite(rate) for name, rate in rates},
        **target.read(value),
        "names": names,
        "config": config,  # all that determines the numbers except the seed, named as the command line's flags
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
    """Index, label, scale and paper filter of a cell."""
    return int(cell["index"]), str(cell["label"]), str(cell.get("scale") or ""), dict(cell.get("paper") or {}) or None
