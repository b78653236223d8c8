"""The watch of a run: progress, a curve, and the first and last arrays that a method showed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdjax.engine.clock import Clock
from bdjax.types import Scores, Variables, Watch

_MEASURED = {*range(6), *(5 * 2**power for power in range(20))}
"""Rounds that a model is measured after: the first five, then whenever their number has doubled."""


class Recorder(Watch):
    """Turns what a method shows into progress, a curve, and its first and last arrays; its own time is not counted."""

    def __init__(
        self,
        tick: Callable[[str, int, int], None],
        clock: Clock | None = None,
        measure: Callable[[Variables], dict[str, float]] | None = None,
        lines: Path | None = None,
    ) -> None:
        self._tick, self._clock, self._measure, self._lines = tick, clock, measure, lines
        self.rows: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.scores: Scores | None = None
        self.estimated: Any = None

    def tick(self, stage: str, done: int, total: int) -> None:
        """Pass progress on."""
        self._tick(stage, done, total)

    def recall(self, step: int, **values: Any) -> None:
        """Add a row to the curve, as it was."""
        self.rows.append({"step": step, **{name: float(value) for name, value in values.items()}})

    def judge(self, scores: Scores) -> None:
        """Keep it."""
        self.scores = scores

    def estimate(self, left: Any) -> None:
        """Keep it."""
        self.estimated = left

    def observe(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Measure `variables` if asked to (not after every round of many), add a row to the curve, keep the arrays."""
        with self._clock or Clock():
            row: dict[str, Any] = {"step": step}
            for name, value in arrays.items():
                if name == "suspected":
                    row[name] = np.asarray(value).tolist()
                elif jnp.ndim(value) == 0:
                    row[name] = float(value)
                else:
                    self.arrays.setdefault(f"{name}_first", np.asarray(value))
                    self.arrays[name] = np.asarray(value)
            if self._measure and step in _MEASURED:
                row |= self._measure(variables)
        if self._clock:
            row["seconds"] = self._clock.read()[0]
        self.rows.append(row)
        if self._lines:
            with open(self._lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
