"""Callbacks: one that records progress, curve and arrays of a run, and one that forwards calls to another callback."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdjax.engine.clock import Clock
from bdjax.types import Callback, Scores, Variables

_MEASURED = {*range(6), *(5 * 2**power for power in range(20))}
"""Rounds after which the model is measured: 0 to 5, then 10, 20, 40, ..."""


class Recorder(Callback):
    """Record progress, a curve of scalars, and the first and last arrays of a method.

    The clock is stopped while it measures.

    Attributes:
      rows: one dictionary of scalars per round.
      arrays: the last value of each array by name, and its first value as NAME_first.
      scores: the detection result that the method reported, or None.
      estimated: the estimate of its success that the method reported, or None.
    """

    def __init__(
        self,
        tick: Callable[[str, int, int], None],
        clock: Clock | None = None,
        measure: Callable[[Variables], Mapping[str, Any]] | None = None,
        lines: Path | None = None,
    ) -> None:
        """Create a recorder.

        Args:
          tick: called with (stage, done, total) to show progress.
          clock: clock of the method, stopped while measuring; None: rows have no seconds.
          measure: `measure(variables) -> scalars` to add to a row of the curve; None: measure nothing.
          lines: file to which each row is appended as a line of JSON; None: no file.
        """
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
        """Measure the model after selected rounds, add a row to the curve, and keep the arrays.

        Args:
          step: number of the round.
          variables: the model after the round.
          **arrays: scalars and arrays to record.
        """
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
    """Forward every call to another callback; subclasses override the hooks that they change."""

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
