"""Axes and points of the two plots: change of ACC against ASR, and DER against seconds, with the Pareto fronts.

The template draws them. The page's script moves the points when rows are filtered, on the same axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bdjax.reports.leaderboard.rows import DefenseRow, Row

WIDTH, HEIGHT = 360, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 14, 42
"""Margins in units of the drawing."""
_LOWEST_CHANGE = -30.0
"""Change of ACC in points at the lower end of the axis, at least; larger losses are drawn at the end."""


@dataclass(frozen=True)
class Axis:
    """One axis: values from `low` at pixel `start` to `high` at pixel `end`, in decades where `log`."""

    label: str
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a value; values outside are drawn at the end."""
        low, high, value = (
            (math.log10(max(v, 1e-9)) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Positions and texts of at most about six ticks."""
        if self.log:
            decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [(self.at(10.0**decade), f"{10.0**decade:g}") for decade in decades]
        step = next(s for s in (1, 2, 5, 10, 20, 50) if (self.high - self.low) / s <= 6)
        first = math.ceil(self.low / step)
        return [(self.at(k * step), f"{k * step:g}") for k in range(first, math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Plot:
    """A drawing: its axes, points and Pareto front."""

    name: str
    title: str
    x: Axis
    y: Axis
    points: tuple[tuple[DefenseRow, float, float], ...]
    """Defenses with their positions."""
    front: str
    """Path of the Pareto front: the smallest x for every y."""


def plots(rows: Sequence[Row], defenses: Sequence[DefenseRow]) -> list[Plot]:
    """The two plots of the defenses; none without an ASR.

    Args:
      rows: give the ranges of the axes, so that these do not depend on a filter.
      defenses: the points.

    Returns:
      The plots.
    """
    measured = [row for row in rows if row.mean("der") is not None]
    if not measured:
        return []
    changes = [row.acc_change for row in measured]
    low = max(math.floor(min(*changes, -1.0)), _LOWEST_CHANGE)
    across = (LEFT, WIDTH - RIGHT)
    up = (HEIGHT - BOTTOM, TOP)
    asr = Axis("ASR after the defense, %", 0.0, 100.0, *across)
    change = Axis("change of ACC, points", low, math.ceil(max(*changes, 1.0)), *up)
    seconds = [max(row.mean("seconds") or 0.0, 1e-3) for row in measured]
    lowest = math.floor(math.log10(min(seconds)))
    highest = max(math.ceil(math.log10(max(seconds))), lowest + 1)
    time = Axis("seconds of the defense, median", 10.0**lowest, 10.0**highest, *across, log=True)
    ratings = [row.mean("der") or 0.0 for row in measured]
    der = Axis("DER, %", 10.0 * math.floor(min(*ratings, 90.0) / 10), 100.0, *up)
    return [
        _plot("acc-asr", "Accuracy against attack success", asr, change, defenses, "asr_after", "acc_change"),
        _plot("der-seconds", "Effect against time", time, der, defenses, "seconds", "der"),
    ]


def _plot(name: str, title: str, x: Axis, y: Axis, defenses: Sequence[DefenseRow], across: str, up: str) -> Plot:
    points = tuple((row, x.at(getattr(row, across)), y.at(getattr(row, up))) for row in defenses)
    return Plot(name, title, x, y, points, _front([point[1:] for point in points]))


def _front(points: Sequence[tuple[float, float]]) -> str:
    """Steps through the points to whose left no other one is as high."""
    path, best = "", math.inf
    for x, y in sorted(points):
        if y < best:
            path += f"M{x} {y}" if not path else f"H{x}V{y}"
            best = y
    return path
