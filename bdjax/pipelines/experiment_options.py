"""Files of experiments: their options, their cells, and how a file is loaded.

A file defines TITLE, SEEDS and either CELLS, or a dataclass `Options` that extends :class:`ExperimentOptions` and
`cells(options) -> Sequence[Cell]`. The fields of `Options` are flags of `bdjax sweep FILE`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from bdjax import registry
from bdjax.config import Experiment, from_json
from bdjax.errors import InputError


@dataclass(frozen=True)
class Cell:
    """One cell of a table: an experiment and the published cell beside it."""

    label: str
    """Name of the row."""
    experiment: Experiment
    """Its seed is replaced by each of the sweep's."""
    paper: dict[str, str] | None = None
    """Column values that pick the published row from experiments/papers/*.csv."""
    scale: str = ""
    """How the run is smaller than the paper's ("6 of 50 epochs"); empty when it is not."""
    clean: bool = False
    """Also train the model without poison, for AGE's score; cells that share it train it once."""


@dataclass(frozen=True)
class ExperimentOptions:
    """Options that every file of experiments with `cells(options)` has."""

    dataset: str = ""
    """Source of the data set: digits, npz:PATH, folder:PATH or tfds:NAME; default: the file's."""
    model: str = ""
    """Network; default: the file's."""
    epochs: int = 0
    """Epochs of the victim's training; default (0): the file's. Tables mark fewer."""
    scale: Literal["paper", "smoke"] = "paper"
    """smoke: the digits, a small network and one epoch, to see that the file runs."""


@dataclass(frozen=True)
class Grid:
    """A loaded file of experiments."""

    file: Path
    title: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    options: ExperimentOptions | None
    """None: a file with CELLS."""

    @property
    def options_record(self) -> dict[str, Any] | None:
        """The options as JSON values."""
        if self.options is None:
            return None
        record: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.options)))
        return record


def options_class(file: Path) -> type[ExperimentOptions] | None:
    """The class of a file's options; None for a file with CELLS. Raises InputError when the file defines neither."""
    module = _load(Path(file))
    if hasattr(module, "CELLS"):
        return None
    kind: type[ExperimentOptions] = getattr(module, "Options", ExperimentOptions)
    return kind


def load_grid(file: Path, options: ExperimentOptions | Mapping[str, Any] | None = None) -> Grid:
    """Load a file of experiments.

    Args:
      file: a Python file.
      options: an instance of its `Options`, or their JSON values; None: the defaults.

    Returns:
      Its title, seeds and cells.

    Raises:
      InputError: the file defines no experiments, has no such options, or two cells have the same label.
    """
    module, kind = _load(Path(file)), options_class(file)
    if kind is None:
        if options:
            raise InputError(f"{file} defines CELLS and has no options.")
        cells: Sequence[Cell] = module.CELLS
        resolved = None
    else:
        values = dataclasses.asdict(options) if isinstance(options, ExperimentOptions) else dict(options or {})
        resolved = from_json(kind, values, "options")
        cells = module.cells(resolved)
    labels = [cell.label for cell in cells]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"{file}: several cells are called {', '.join(twice)}. Give each its own label.")
    return Grid(Path(file), module.TITLE, tuple(module.SEEDS), tuple(cells), resolved)


def _load(file: Path) -> ModuleType:
    module = registry.load_file(file)
    missing = [name for name in ("TITLE", "SEEDS") if not hasattr(module, name)]
    if missing or not (hasattr(module, "CELLS") or hasattr(module, "cells")):
        name = missing[0] if missing else "CELLS or cells(options)"
        raise InputError(
            f"{file} defines no {name}. A file of experiments defines TITLE, SEEDS and CELLS or cells(options)."
        )
    return module
