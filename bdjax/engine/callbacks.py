"""Callbacks: what records a run (progress, curve, first and last arrays), and the base of those that forward calls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdjax.engine.clock import Clock
from bdjax.types import Callback, Scores, Variables

_MEASURED = {*range(6), *(5 * 2**power for power in range(20))}
"""Rounds that a model is measured after: the first five, then whenever their number has doubled."""


class Recorder(Callback):
    """Records progress, a curve of scalars, and the first and last arrays of a method; its own time is not counted.

    Attributes:
      rows: one dictionary of scalars a round.
      arrays: by name, the last value of every array, and the first as NAME_first.
      scores: the detection that the method reported, or None.
      estimated: the estimate of success that the method reported, or None.
    """

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

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Show the progress."""
        self._tick(stage, done, total)

    def on_round_restored(self, step: int, **values: Any) -> None:
        """Add a row to the curve with the scalars of a round that ended before the run was killed."""
        self.rows.append({"step": step, **{name: float(value) for name, value in values.items()}})

    def on_detection(self, scores: Scores) -> None:
        """Keep the detection."""
        self.scores = scores

    def on_estimate(self, estimated: Any) -> None:
        """Keep the estimate."""
        self.estimated = estimated

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
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


class ForwardingCallback(Callback):
    """Passes every call on to another callback; a subclass overrides what it changes."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Forward the progress."""
        self._callback.on_progress(stage, done, total)

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Forward the variables and the arrays of a round."""
        self._callback.on_round_end(step, variables, **arrays)

    def on_round_restored(self, step: int, **values: Any) -> None:
        """Forward the scalars of a round that ended before the run was killed."""
        self._callback.on_round_restored(step, **values)

    def on_detection(self, scores: Scores) -> None:
        """Forward a detection."""
        self._callback.on_detection(scores)

    def on_estimate(self, estimated: Any) -> None:
        """Forward an estimate of success."""
        self._callback.on_estimate(estimated)
