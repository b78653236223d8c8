"""Backends that carry out the cells of a grid, one file each: processes of this machine, Slurm arrays, a Ray cluster.

Every backend carries out a cell as the command `bdjax _cell` in a process of its own, so that a cell's numbers, peak
memory and log do not depend on the backend. Results are files whose names are hashes of what decides them: a cell that
was lost with its machine is carried out again, and a grid is continued from any machine that sees its directory.
"""

import importlib
import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from bdjax.errors import InputError

Name = Literal["local", "slurm", "ray"]
"""Name of a backend: a module of this package."""

ATTEMPTS = 2
"""How often a cell is carried out whose process ends without an exit code of its own (out of memory, lost machine)."""


@dataclass(frozen=True)
class CellTask:
    """A cell of a grid with one seed."""

    index: int
    """Of the cell in its file."""
    seed: int
    label: str
    victim: Path | None = None
    """Directory of the victim that the first of several cells trains for all; None: no victim is trained."""

    @property
    def name(self) -> str:
        """The cell and its seed, for messages."""
        return f"{self.label}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Cells to carry out, and what their commands have in common."""

    file: Path
    """The file of experiments."""
    out: Path
    """Directory of the results."""
    tasks: tuple[CellTask, ...]
    options: Mapping[str, Any] | None = None
    """Of the file, as JSON values."""
    devices: int = 0
    """Local devices that each cell uses, 0 for all."""

    def command(self, task: CellTask, *flags: str) -> list[str]:
        """The command that carries out one cell; its paths are absolute."""
        return [*self.program(flags), str(task.index), str(task.seed), *self.settings()]

    def program(self, flags: Sequence[str] = ()) -> list[str]:
        """The words of a cell's command before its index and seed."""
        return [sys.executable, "-m", "bdjax", "_cell", *flags, str(self.file.resolve())]

    def settings(self) -> list[str]:
        """The words of a cell's command behind its index and seed."""
        words = [str(self.out.resolve()), str(self.devices)]
        return words if self.options is None else [*words, json.dumps(self.options)]

    def log(self, task: CellTask) -> Path:
        """The file of what a cell prints."""
        return self.out.resolve() / "logs" / f"cell-{task.index}-seed-{task.seed}.log"


@dataclass(frozen=True)
class Resources:
    """What the cells of a grid are given, and how a cluster is reached."""

    workers: int = 0
    """Cells at a time; 0: one on this machine, as many as there is room for on a cluster."""
    gpus: float = 0.0
    """GPUs of a cell on a cluster. With Ray a fraction shares one."""
    cpus: int = 1
    """CPU cores of a cell on a cluster."""
    sbatch: str = ""
    """Further options of sbatch, such as "--partition=gpu --time=4:00:00"."""
    address: str = ""
    """Address of a Ray cluster; "": the one of this machine, else Ray is started here."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(f"--workers must be at least 0, got {self.workers}.")
        if self.gpus < 0 or self.cpus < 1:
            raise InputError(
                f"a cell needs --gpus-per-cell of at least 0 and --cpus-per-cell of at least 1; got {self.gpus:g} and "
                f"{self.cpus}."
            )


@dataclass(frozen=True)
class Ended:
    """A cell that ended."""

    task: CellTask
    error: str
    """One line with its log; "": it is finished."""
    seconds: float
    """Wall time in which it was carried out the last time."""


class Backend(Protocol):
    """What the module of a backend offers."""

    def run(self, plan: Plan, resources: Resources, say: Callable[[str], None]) -> Iterator[Ended]:
        """Carry out all cells.

        Args:
          plan: the cells.
          resources: what each of them is given.
          say: called with lines for the user, such as a cell that is started again.

        Yields:
          Each cell when it has ended, in any order.

        Raises:
          InputError: the backend is not installed, or cannot give what is asked for.
        """

    def describe(self, plan: Plan, resources: Resources) -> str:
        """What :meth:`run` would do, as text: scripts or commands.

        Args:
          plan: the cells.
          resources: what each of them is given.

        Returns:
          The text.
        """


def load(name: Name) -> Backend:
    """The backend of a name."""
    backend: Any = importlib.import_module(f"bdjax.pipelines.backends.{name}")
    return backend  # type: ignore[no-any-return]


def startable(waiting: Sequence[CellTask], training: Collection[Path]) -> list[CellTask]:
    """The cells that can start now without waiting for one another.

    Of the cells that need a victim which is not there yet, only the first is among them: it trains the victim, and the
    others would hold their GPUs while they wait.

    Args:
      waiting: cells that were not started.
      training: directories of victims that running cells need.

    Returns:
      Some of `waiting`, in order.
    """
    exists: dict[Path, bool] = {}
    chosen, busy = [], set(training)
    for task in waiting:
        if task.victim is not None and not exists.setdefault(task.victim, task.victim.exists()):
            if task.victim in busy:
                continue
            busy.add(task.victim)
        chosen.append(task)
    return chosen


def commands(plan: Plan) -> str:
    """The commands of all cells, one a line, as a shell would run them."""
    return "\n".join(shlex.join(plan.command(task)) for task in plan.tasks)


def failure(log: Path, code: int | str) -> str:
    """The last line of a log and its path, as the error of a cell that ended with an exit code."""
    lines = []
    if log.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else f'exit code {code}'} (log: {log})"
