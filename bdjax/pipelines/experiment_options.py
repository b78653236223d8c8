"""Files of experiments: their options, their cells, and how a file is loaded.

A file defines TITLE, SEEDS and either CELLS, or a dataclass `Options` that extends :class:`ExperimentOptions` and
`cells(options) -> Sequence[Cell]`. The fields of `Options` are flags of `bdjax sweep FILE`. A file may define
`summarise(results) -> str`, a Markdown table of its finished cells (:class:`CellResult`), and `draw(results, folder)`,
which writes figures into a folder.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol

from bdjax import registry
from bdjax.config import Experiment, from_json
from bdjax.errors import InputError
from bdjax.pipelines.context import Context

SMOKE = {"dataset": "digits", "model": "cnn", "epochs": 1}
"""Values of options at the scale smoke, which show within seconds that a file runs."""


class Stage(Protocol):
    """A step of a cell after its defense: a frozen dataclass of JSON values (:mod:`bdjax.pipelines.stages`)."""

    @property
    def name(self) -> str:
        """Name of the step, unique in its cell."""

    def run(self, model: Path, seed: int, context: Context) -> Mapping[str, Any]:
        """Carry out the step.

        Args:
          model: directory of the run with the purified model, or of the victim in a cell without a defense.
          seed: of the cell.
          context: devices, progress, the store of victims.

        Returns:
          Its record, JSON values.
        """


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a pipeline of an attack, a defense and further stages, and the published cell beside it."""

    label: str
    """Name of the row."""
    experiment: Experiment
    """Its seed is replaced by each of the sweep's. Without a defense the victim itself is measured."""
    paper: dict[str, str] | None = None
    """Column values that pick the published row from experiments/papers/*.csv."""
    scale: str = ""
    """How the run is smaller than the paper's ("6 of 50 epochs"); empty when it is not."""
    clean: bool = False
    """Also train the model without poison, for AGE's score; cells that share it train it once."""
    stages: tuple[Stage, ...] = ()
    """What is done with the purified model (or the victim) afterwards, such as a re-activation attack."""
    stored: Path | None = None
    """Directory of a victim that exists already, or a weight file that is imported as `experiment.model` and measured
    with the experiment's attack; None: the victim is trained."""
    measured: int = 0
    """Largest number of held-out images that the rates are measured on, drawn at random; 0: all."""
    estimate: bool = False
    """Also estimate the success rate without the trigger."""
    victim: str = ""
    """Name of the victim, for leaderboards of victims that a list names."""


@dataclass(frozen=True)
class CellResult:
    """A finished cell of a grid with one seed."""

    cell: Cell
    seed: int
    directory: Path
    """Of the result and of the purified model."""
    result: Mapping[str, Any]
    """result.json: :class:`bdjax.pipelines.results.RunResult`, or VictimResult in a cell without a defense."""
    stages: Mapping[str, Mapping[str, Any]]
    """Records of the stages by name."""


@dataclass(frozen=True)
class ExperimentOptions:
    """Options that every file of experiments with `cells(options)` has."""

    scale: Literal["paper", "cpu", "smoke"] = "paper"
    """paper: the published setting; cpu: a small network and few epochs, as in experiments/results; smoke: seconds on
    the digits, to see that the file runs."""
    dataset: str = ""
    """Source of the data set: digits, npz:PATH, folder:PATH or tfds:NAME; default: the scale's."""
    model: str = ""
    """Network; default: the scale's."""
    epochs: int = 0
    """Epochs of the victim's training; default (0): the scale's. Tables mark fewer than the paper's."""

    SCALES: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "cpu": {}, "smoke": SMOKE}
    """By scale: values of the options that are not given, which are those with an empty value (0, "" or ())."""

    def __post_init__(self) -> None:
        if self.scale not in self.SCALES:
            raise InputError(f"there is no scale {self.scale!r} here. Choose from {', '.join(self.SCALES)}.")
        for name, value in self.SCALES[self.scale].items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class SeveralDatasets(ExperimentOptions):
    """Options of a file whose rows are of several data sets."""

    datasets: tuple[str, ...] = ()
    """Data sets of the table, each NAME or NAME=SOURCE; the rows of others are left out. With a single NAME, --dataset
    is its source. Default: the scale's."""

    SOURCES: ClassVar[Mapping[str, str]] = {}
    """Name of each data set and its usual source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [text.partition("=")[0] for text in self.datasets] or list(self.SOURCES)
        if unknown := [name for name in names if name not in self.SOURCES]:
            raise InputError(f"no data set {', '.join(unknown)} here. Choose from {', '.join(self.SOURCES)}.")
        if self.dataset and len(names) > 1:
            raise InputError(
                f"--dataset {self.dataset} does not say which of {', '.join(names)} it is. "
                f"Use --datasets {names[0]}={self.dataset}."
            )

    @property
    def sources(self) -> dict[str, str]:
        """Source of each data set of the table, by name."""
        chosen = dict(text.partition("=")[::2] for text in self.datasets) or dict.fromkeys(self.SOURCES, "")
        return {name: source or self.dataset or self.SOURCES[name] for name, source in chosen.items()}


@dataclass(frozen=True)
class Grid:
    """A loaded file of experiments."""

    file: Path
    title: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    options: ExperimentOptions | None
    """None: a file with CELLS."""
    summarise: Callable[[Sequence[CellResult]], str] | None = None
    """A Markdown table of the finished cells, where the file defines one."""
    draw: Callable[[Sequence[CellResult], Path], None] | None = None
    """Writes figures of the finished cells into a folder, where the file defines it."""

    @property
    def options_record(self) -> dict[str, Any] | None:
        """The resolved options as JSON values."""
        if self.options is None:
            return None
        record: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.options)))
        return record

    @property
    def shown_file(self) -> str:
        """Path of the file as tables print it: from the folder experiments on."""
        parts = self.file.resolve().parts
        return "/".join(parts[parts.index("experiments") :] if "experiments" in parts else ("experiments", parts[-1]))

    @property
    def out(self) -> Path:
        """Usual directory of the results: runs/PAPER/TABLE."""
        return Path("runs", *Path(self.shown_file).with_suffix("").parts[1:])

    def command(self, seeds: Sequence[int]) -> str:
        """The command that repeats the sweep, with the options that are not the defaults of the scale."""
        words = ["bdjax sweep", self.shown_file]
        if self.options is not None:
            usual = type(self.options)(scale=self.options.scale)
            for field in dataclasses.fields(self.options):
                value = getattr(self.options, field.name)
                if value != (field.default if field.name == "scale" else getattr(usual, field.name)):
                    words.append(f"--{field.name.replace('_', '-')} {_as_word(value)}")
        return " ".join([*words, f"--seeds {','.join(map(str, seeds))}"])


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
      Its title, seeds (at the scale smoke the first alone) and cells.

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
    seeds = tuple(module.SEEDS)[: 1 if resolved is not None and resolved.scale == "smoke" else None]
    optional = (getattr(module, name, None) for name in ("summarise", "draw"))
    return Grid(Path(file), module.TITLE, seeds, tuple(cells), resolved, *optional)


def _load(file: Path) -> ModuleType:
    module = registry.load_file(file)
    missing = [name for name in ("TITLE", "SEEDS") if not hasattr(module, name)]
    if missing or not (hasattr(module, "CELLS") or hasattr(module, "cells")):
        name = missing[0] if missing else "CELLS or cells(options)"
        raise InputError(
            f"{file} defines no {name}. A file of experiments defines TITLE, SEEDS and CELLS or cells(options)."
        )
    return module


def _as_word(value: Any) -> str:
    """An option's value as it is written on the command line."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f'"{text}"' if set(text) & set(' ()"=;') - {"="} else text
