"""The runs below some directories as flat records, one for each defense of a victim with one seed.

Three forms are read: result.json and its copies under other names; the re-activation attacks on these, which give R-ASR
and Q-ASR; and lists of rows as experiments/foreign/bench.py writes them, whose victims are described by the files
victims.json below the directories.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.io import records
from bdjax.io.files import read_record
from bdjax.pipelines.results import upgrade
from bdjax.reports import papers
from bdjax.reports.leaderboard.published import published

_REACTIVATED = {"R-ASR": "r_asr", "Q-ASR": "q_asr"}
"""Name of the metric of a re-activation attack -> column."""
_CONFIGS = {"attack": "attack_config", "defense": "defense_config", "fit": "fit", "split": "split"}
_ROW = {"victim", "defense", "size", "seed", "before_acc", "after_acc"}
"""Fields by which a row of bench.py is known."""


@dataclass(frozen=True)
class Record:
    """One defense of one victim with one seed. Rates in percent; None or "" where something was not measured."""

    victim: str
    """Name of the victim, where a list of victims names it."""
    attack: str
    dataset: str
    model: str
    defense: str
    label: str
    """Of the cell of a grid."""
    set: str
    """"dev" for victims that settings were chosen on, or another word."""
    scale: str
    """How the run is smaller than the published one."""
    seed: int
    n_defender: int
    """Clean images of the defender."""
    n_test: int
    """Held-out images of the accuracy."""
    n_asr: int
    """Triggered images of the ASR."""
    acc_before: float
    acc_after: float
    asr_before: float | None
    asr_after: float | None
    asr_after_incl_target: float | None
    """With images of the target class counted, as I-BAU does."""
    der: float | None
    """Defense effectiveness rating (:func:`bdjax.metrics.der.der`)."""
    r_asr: float | None
    """ASR after retuning, the mean over its seeds."""
    q_asr: float | None
    """ASR after the query-based re-activation attack, the mean over its seeds."""
    estimate: float | None
    """Estimate of the ASR after the defense that needs no trigger."""
    score: float | None
    """AGE's score."""
    seconds: float
    """Of the defense, without compilation and measurements."""
    peak_memory_mib: float | None
    peak_memory_of: str
    device: str
    """Kind and number of devices."""
    bdjax: str
    jax: str
    victim_hash: str
    config_hash: str
    paper: str
    """Published numbers: paper, table, ACC and ASR after the defense, in percent; a ~ before those that have the same
    names but perhaps other settings."""
    source: Path
    """File that the record was read from."""
    config: Mapping[str, Any] = field(repr=False)
    """All settings by their flag (`defense.rounds`)."""

    def values(self) -> dict[str, Any]:
        """The columns of records.csv and records.parquet without the source."""
        names = (f.name for f in dataclasses.fields(self) if f.name not in ("source", "config"))
        return {name: getattr(self, name) for name in names} | {"config": json.dumps(self.config, sort_keys=True)}


def read(directories: Sequence[Path], papers_folder: Path | None = None) -> list[Record]:
    """Read all records below some directories.

    Args:
      directories: searched for runs; hidden folders and those of models are left out.
      papers_folder: folder of the papers' tables; None: experiments/papers where it exists.

    Returns:
      The records. Of copies (the same configuration and seed) the first counts.

    Raises:
      InputError: a directory is missing or holds no record, a result.json is damaged, or a cell's paper filter selects
        no published value or several.
    """
    values: list[tuple[Path, Any]] = []
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"no such directory: {directory}. Give folders with runs, or of experiments/results.")
        values += _read_values(directory)
    described = {str(v["name"]): v for path, value in values if path.name == "victims.json" for v in value}
    tables = _tables(papers_folder)
    reactivated = _reactivations(values)
    found: dict[Any, Record] = {}
    for path, value in values:
        with records.reading_record(path):
            for record in _records_of(path, value, described, tables):
                rates: Any = reactivated.get(record.config_hash, {}) if record.config_hash else {}
                key = record.config_hash or (record.victim, record.defense, record.n_defender, record.seed)
                found.setdefault(key, dataclasses.replace(record, **rates))
    if not found:
        shown = ", ".join(map(str, directories))
        raise InputError(f"there is no run of a defense below {shown}. Run `bdjax sweep` or `bdjax run` first.")
    return _with_der(list(found.values()))


def _read_values(directory: Path) -> Iterator[tuple[Path, Any]]:
    """The JSON files below a directory with their values; a file that is not JSON only matters if it is a result."""
    for folder, names, files in os.walk(directory):
        names[:] = sorted(name for name in names if not name.startswith(".") and name != "logs")
        if "manifest.json" in files:  # a model
            names.clear()
            continue
        for name in sorted(files):
            path = Path(folder, name)
            if name == "result.json":
                with records.reading_record(path):
                    yield path, records.make_visible(read_record(path))
            elif name.endswith(".json"):
                try:
                    yield path, records.make_visible(read_record(path))
                except (ValueError, InputError):
                    continue


def _tables(folder: Path | None) -> list[dict[str, str]]:
    """The papers' tables; none where the default folder does not exist."""
    try:
        return papers.read_tables(folder)
    except InputError:
        if folder is not None:
            raise
        return []


def _reactivations(values: Sequence[tuple[Path, Any]]) -> dict[str, dict[str, float]]:
    """For each hash of a purified model the ASR after re-activation attacks, in percent, by column."""
    rates: dict[str, dict[str, list[float]]] = {}
    for path, value in values:
        if isinstance(value, dict) and value.get("kind") == "reactivation":
            with records.reading_record(path):
                column = _REACTIVATED.get(value["metric"])
                if column and value["after"]["asr"] is not None:
                    of_model = rates.setdefault(str(value["hash"]), {})
                    of_model.setdefault(column, []).append(100 * _finite(value["after"]["asr"]))
    return {key: {name: float(np.mean(v)) for name, v in by_name.items()} for key, by_name in rates.items()}


def _records_of(
    path: Path, value: Any, described: Mapping[str, Any], tables: Sequence[dict[str, str]]
) -> Iterator[Record]:
    """The records of one file."""
    if isinstance(value, dict):
        is_run = {"attack", "defense", "before", "after", "config_hash"} <= value.keys() and not value.get("kind")
        if is_run or (path.name == "result.json" and not value.get("kind")):
            yield _of_run(path, value, described, tables)
    elif isinstance(value, list) and value and all(isinstance(row, dict) and row.keys() >= _ROW for row in value):
        for row in value:
            yield _of_row(path, row, described.get(str(row["victim"]), {}), tables)


def _of_run(
    path: Path, value: Mapping[str, Any], described: Mapping[str, Any], tables: Sequence[dict[str, str]]
) -> Record:
    """The record of a result.json."""
    result = upgrade(value)
    cell, env, estimate = result.get("cell") or {}, result["env"], result["estimate"]
    config = {f"{part}.{name}": v for part, key in _CONFIGS.items() for name, v in (result[key] or {}).items()}
    names = [str(result[name]) for name in ("attack", "dataset", "model", "defense")]
    memory = result["peak_memory_bytes"]
    victim = str(cell.get("victim") or "")
    return Record(
        victim=victim,
        attack=names[0], dataset=names[1], model=names[2], defense=names[3],
        label=str(cell.get("label") or ""),
        set=str(described.get(victim, {}).get("set", "")), scale=str(cell.get("scale") or ""),
        seed=int(result["seed"]), n_defender=int(result["n_defender"]),
        n_test=int(result["n_test"]), n_asr=int(result["n_asr"]),
        acc_before=100 * _finite(result["before"]["acc"]), acc_after=100 * _finite(result["after"]["acc"]),
        asr_before=_percent(result["before"]["asr"]), asr_after=_percent(result["after"]["asr"]),
        asr_after_incl_target=_percent(result["after"]["asr_with_target"]),
        der=None, r_asr=None, q_asr=None,
        estimate=None if estimate is None else _percent(estimate["rate"]), score=_percent(result["score"]),
        seconds=_finite(result["seconds"]["defense"]),
        peak_memory_mib=None if memory is None else _finite(memory) / 2**20,
        peak_memory_of=str(result["peak_memory_of"]), device=f"{env['device']} x {env['devices']}",
        bdjax=str(env.get("bdjax")), jax=str(env.get("jax")),
        victim_hash=str(result["victim_hash"]), config_hash=str(result["config_hash"]),
        paper=published(names, cell.get("paper"), tables), source=path, config=config,
    )  # fmt: skip


def _of_row(
    path: Path, row: Mapping[str, Any], described: Mapping[str, Any], tables: Sequence[dict[str, str]]
) -> Record:
    """The record of a row of bench.py, whose victim is described elsewhere."""
    dataset = Path(
        str(described.get("dataset", "")).rpartition(":")[2]
    ).stem  # as its record calls it: npz:DIR/NAME.npz
    names = [str(described.get("attack", "")), dataset, str(described.get("model", "")), str(row["defense"])]
    estimate, memory = row.get("estimate"), row.get("peak_memory_bytes")
    rates = [row[f"{phase}_asr"] for phase in ("before", "after")]
    return Record(
        victim=str(row["victim"]),
        attack=names[0], dataset=names[1], model=names[2], defense=names[3],
        label="", set=str(row.get("set", "")), scale=str(described.get("scale", "")),
        seed=int(row["seed"]), n_defender=int(row["size"]), n_test=int(row["n_test"]), n_asr=int(row["n_asr"]),
        acc_before=_finite(row["before_acc"]), acc_after=_finite(row["after_acc"]),
        asr_before=None if rates[0] is None else _finite(rates[0]),
        asr_after=None if rates[1] is None else _finite(rates[1]), asr_after_incl_target=None,
        der=None, r_asr=None, q_asr=None,
        estimate=None if estimate is None else _percent(estimate["rate"]), score=None,
        seconds=_finite(row["seconds"]), peak_memory_mib=None if memory is None else _finite(memory) / 2**20,
        peak_memory_of="", device=str(row.get("device", "")), bdjax="", jax="", victim_hash="", config_hash="",
        paper=published(names, None, tables), source=path, config={},
    )  # fmt: skip


def _with_der(found: Sequence[Record]) -> list[Record]:
    """The records with their DER, where an ASR was measured."""
    import jax.numpy as jnp

    from bdjax.metrics.der import der

    measured = [record for record in found if record.asr_before is not None and record.asr_after is not None]
    acc_b, acc_a, asr_b, asr_a = (
        jnp.asarray([getattr(record, name) for record in measured], jnp.float32) / 100
        for name in ("acc_before", "acc_after", "asr_before", "asr_after")
    )
    percent = map(float, 100 * der(acc_b, acc_a, asr_b, asr_a))
    ratings = dict(zip(map(id, measured), percent, strict=True))
    return [dataclasses.replace(record, der=ratings.get(id(record))) for record in found]


def _percent(rate: Any) -> float | None:
    return None if rate is None else 100 * _finite(rate)


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is no finite number")
    return number
