"""A grid of experiments: every unfinished cell runs in a process of its own, and failures are listed at the end.

:mod:`bdjax.pipelines.experiment_options` describes a file of experiments, :mod:`bdjax.pipelines.backends` where its
cells are carried out. Cells that share a victim train it once; the cell of a worker that was killed is started again
and continues from the last epoch.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import backends, cells
from bdjax.pipelines.context import Context
from bdjax.pipelines.experiment_options import Cell, ExperimentOptions, Grid, load_grid
from bdjax.pipelines.summary import write_summary
from bdjax.text import parse_integers


@dataclass(frozen=True)
class SweepRequest:
    """A file of experiments, what of it is carried out, and where."""

    file: Path
    out: Path | None = None
    """Directory of the results, which gets cells.json, victims/, HASH/ for each run, logs/ and, for a file that
    summarises its results, summary.md; None: runs/PAPER/TABLE, the path of the file below experiments/."""
    options: ExperimentOptions | None = None
    """Of a file that has options; None: the defaults."""
    seeds: str = ""
    """Comma-separated; "": the file's SEEDS."""
    shard: str = "0/1"
    """"i/n", the i-th of n parts; cells that share a victim stay in one part."""
    devices: int = 0
    """Local devices that each cell uses, 0 for all."""
    backend: backends.Name = "local"
    """Where the cells are carried out."""
    resources: backends.Resources = backends.Resources()
    """What each cell is given there."""


@dataclass(frozen=True)
class _Job:
    index: int
    seed: int
    cell: Cell

    @property
    def name(self) -> str:
        return f"{self.cell.label}, seed {self.seed}"


def sweep(
    request: SweepRequest,
    *,
    tick: Callable[[str, int, int], None] = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Run the cells of a file of experiments that have no result yet.

    Args:
      request: the file, and what of it is carried out where.
      tick: called with the progress.
      say: called with a line for each cell that ends.

    Returns:
      A line for each failed cell, with its error.

    Raises:
      InputError: the file defines no experiments, or an option is out of range.
    """
    grid, seeds, jobs = _jobs(request)
    out = request.out or grid.out
    out.mkdir(parents=True, exist_ok=True)
    _write_plan(grid, out, seeds)
    (out / "logs").mkdir(exist_ok=True)
    plan, failures = _unfinished(request, grid, out, jobs)
    done = len(jobs) - len(plan.tasks)
    say(f"{grid.title}: {len(jobs)} cells, {done - len(failures)} finished before, {len(plan.tasks)} to do")
    tick("grid", done, len(jobs))
    if plan.tasks:
        for ended in backends.load(request.backend).run(plan, request.resources, say):
            done += 1
            failures += [f"{ended.task.name}: {ended.error}"] if ended.error else []
            state = "failed" if ended.error else "finished"
            say(f"[{done}/{len(jobs)}] {ended.task.name}: {state} after {ended.seconds:.0f} s")
            tick("grid", done, len(jobs))
    write_summary(grid, out, seeds)
    if failures:
        say(f"{len(failures)} of {len(jobs)} cells failed:\n" + "\n".join(f"  {line}" for line in failures))
    return failures


def describe(request: SweepRequest) -> str:
    """What :func:`sweep` would carry out, as the scripts or commands of the backend; nothing is written or run.

    Raises InputError as :func:`sweep` does, and for a cell whose result is damaged or whose data set is missing.
    """
    grid, _, jobs = _jobs(request)
    plan, failures = _unfinished(request, grid, request.out or grid.out, jobs)
    if failures:
        raise InputError("; ".join(failures))
    return backends.load(request.backend).describe(plan, request.resources) if plan.tasks else "nothing is left to do"


def _jobs(request: SweepRequest) -> tuple[Grid, tuple[int, ...], list[_Job]]:
    """The loaded file, the seeds, and the cells of the shard with each of them."""
    grid = load_grid(request.file, request.options)
    seeds = parse_integers("--seeds", request.seeds, "0,1,2") if request.seeds else grid.seeds
    return grid, seeds, _shard([_Job(i, s, cell) for s in seeds for i, cell in enumerate(grid.cells)], request.shard)


def _unfinished(request: SweepRequest, grid: Grid, out: Path, jobs: list[_Job]) -> tuple[backends.Plan, list[str]]:
    """The cells without a result, and a line for each that cannot be carried out."""
    tasks, failures = [], []
    for job in jobs:
        try:
            if cells.read(job.cell, job.seed, out) is None:
                victim = cells.trained_victim(job.cell, job.seed, out)
                tasks.append(backends.CellTask(job.index, job.seed, job.cell.label, victim))
        except InputError as error:
            failures.append(f"{job.name}: {error}")
    return backends.Plan(grid.file, out, tuple(tasks), grid.options_record, request.devices), failures


def run_cell(
    file: Path, index: int, seed: int, out: Path, devices: int = 0, options: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Run one cell of a file of experiments in this process.

    Args:
      file: of the experiments.
      index: of the cell.
      seed: replaces the experiment's.
      out: directory of all results.
      devices: local devices to use, 0 for all.
      options: of the file, as JSON values.

    Returns:
      The result of the run, or of the victim in a cell without a defense.
    """
    cell = load_grid(file, options).cells[index]
    record = {"index": index, "label": cell.label, "scale": cell.scale, "paper": cell.paper}
    record |= {"victim": cell.victim} if cell.victim else {}
    return cells.carry_out(cell, seed, out, Context(devices), {"cell": record})


def _shard(jobs: list[_Job], shard: str) -> list[_Job]:
    try:
        part, parts = (int(value) for value in shard.split("/"))
        if not 0 <= part < parts:
            raise ValueError
    except ValueError:
        raise InputError(f"--shard must be i/n with 0 <= i < n, such as 0/4; got {shard!r}.") from None
    hashes = [cells.victim_hash(job.cell, job.seed) for job in jobs]
    numbers = {victim: number for number, victim in enumerate(dict.fromkeys(hashes))}
    return [job for job, victim in zip(jobs, hashes, strict=True) if numbers[victim] % parts == part]


def _write_plan(grid: Grid, out: Path, seeds: tuple[int, ...]) -> None:
    planned = [
        {
            "index": index,
            "label": cell.label,
            "attack": cell.experiment.attack,
            "defense": cell.experiment.defense,
            "dataset": cell.experiment.dataset,
            "model": cell.experiment.model,
            "scale": cell.scale,
            "paper": cell.paper,
            "seeds": seeds,
        }
        for index, cell in enumerate(grid.cells)
    ]
    plan: dict[str, Any] = {"file": grid.shown_file, "command": grid.command(seeds), "title": grid.title}
    if (options := grid.options_record) is not None:
        plan["options"] = options
    plan["cells"] = planned
    checkpoint.write_text(out / "cells.json", json.dumps(plan, indent=1) + "\n")
