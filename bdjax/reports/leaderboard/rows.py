"""Rows of the leaderboard: records that differ in their seed alone, with mean and deviation; and a row a defense."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdjax.reports.leaderboard.records import Record

NAMES = ("victim", "attack", "dataset", "model", "defense")


@dataclass(frozen=True)
class Row:
    """Runs of one defense on victims of one kind, with different seeds."""

    records: tuple[Record, ...]
    setting: str
    """The cell's label, and the settings in which the row differs from others with the same names."""

    @property
    def first(self) -> Record:
        """A record, for what is the same in all."""
        return self.records[0]

    def values(self, column: str) -> list[float]:
        """The values of a column that were measured."""
        return [value for record in self.records if (value := getattr(record, column)) is not None]

    def mean(self, column: str) -> float | None:
        """The mean of a column over the seeds."""
        values = self.values(column)
        return float(np.mean(values)) if values else None

    def deviation(self, column: str) -> float | None:
        """The sample standard deviation of a column over the seeds."""
        values = self.values(column)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    @property
    def acc_change(self) -> float:
        """ACC after less ACC before, in points."""
        return float(np.mean([record.acc_after - record.acc_before for record in self.records]))


@dataclass(frozen=True)
class DefenseRow:
    """A defense over all rows in which its ASR was measured."""

    number: int
    """Its place by the mean DER, from 1."""
    defense: str
    n_rows: int
    der: float
    asr_after: float
    acc_change: float
    seconds: float
    """Median over the rows."""
    memory: float | None
    """Largest of the rows, MiB."""


def group(records: Sequence[Record]) -> list[Row]:
    """Group records into rows, by victim, attack, data set, model and images; within these the largest DER is first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        key = [*(getattr(record, name) for name in NAMES), record.n_defender, record.label, record.scale, record.config]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(record)
    parts = [tuple(sorted(part, key=lambda record: record.seed)) for part in groups.values()]
    alike: dict[Any, list[Record]] = {}
    for part in parts:
        alike.setdefault(_alike(part[0]), []).append(part[0])
    rows = [Row(part, _setting(part[0], alike[_alike(part[0])])) for part in parts]
    return sorted(rows, key=_order)


def _alike(record: Record) -> tuple[Any, ...]:
    return (*(getattr(record, name) for name in NAMES), record.n_defender, record.label, record.scale)


def _setting(record: Record, alike: Sequence[Record]) -> str:
    """The label and the settings that are not the same in all of some records."""
    names = dict.fromkeys(name for other in alike for name in other.config)
    differing = [name for name in names if any(o.config.get(name) != record.config.get(name) for o in alike)]
    return "; ".join([*([record.label] if record.label else []), *(f"{n}={record.config.get(n)}" for n in differing)])


def _order(row: Row) -> tuple[Any, ...]:
    first, der = row.first, row.mean("der")
    return (first.victim, first.attack, first.dataset, first.model, first.n_defender, -1 if der is None else -der)


def by_defense(rows: Sequence[Row]) -> list[DefenseRow]:
    """The defenses by their mean DER, each row counting once; those without an ASR are left out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.mean("der") is not None:
            groups.setdefault(row.first.defense, []).append(row)
    ranked = sorted(groups.items(), key=lambda item: (-_mean(item[1], lambda row: row.mean("der") or 0.0), item[0]))
    return [
        DefenseRow(
            number=number,
            defense=defense,
            n_rows=len(part),
            der=_mean(part, lambda row: row.mean("der") or 0.0),
            asr_after=_mean(part, lambda row: row.mean("asr_after") or 0.0),
            acc_change=_mean(part, lambda row: row.acc_change),
            seconds=float(np.median([row.mean("seconds") for row in part])),
            memory=max((value for row in part for value in row.values("peak_memory_mib")), default=None),
        )
        for number, (defense, part) in enumerate(ranked, 1)
    ]


def _mean(rows: Sequence[Row], quantity: Callable[[Row], float]) -> float:
    return float(np.mean([quantity(row) for row in rows]))


def scales(rows: Sequence[Row]) -> Mapping[str, int]:
    """The notes on smaller scales, numbered from 1 in the order of the rows."""
    notes = dict.fromkeys(row.first.scale for row in rows if row.first.scale)
    return {note: number for number, note in enumerate(notes, 1)}
