"""A grid of experiments: every unfinished cell runs in a process of its own, and failures are listed at the end.

:mod:`bdjax.pipelines.experiment_options` describes a file of experiments. Cells that share a victim train it once; the
cell of a worker that was killed is started again and continues from the last epoch.
"""

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import cells
from bdjax.pipelines.context import Context
from bdjax.pipelines.experiment_options import Cell, ExperimentOptions, Grid, load_grid
from bdjax.pipelines.summary import write_summary
from bdjax.text import parse_integers

_ATTEMPTS = 2  # a worker that dies without a word (out of memory, killed) is tried once more


@dataclass(frozen=True)
class _Job:
    index: int
    seed: int
    cell: Cell
    attempt: int = 1

    @property
    def name(self) -> str:
        return f"{self.cell.label}, seed {self.seed}"


def sweep(
    file: Path,
    out: Path | None = None,
    *,
    options: ExperimentOptions | None = None,
    seeds: str = "",
    shard: str = "0/1",
    workers: int = 1,
    devices: int = 0,
    tick: Callable[[str, int, int], None] = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Run the cells of a file of experiments that have no result yet.

    Args:
      file: of the experiments.
      out: directory of the results, which gets cells.json, victims/, HASH/ for each run, logs/ and, for a file that
        summarises its results, summary.md; None: runs/PAPER/TABLE, the path of the file below experiments/.
      options: of a file that has options; None: the defaults.
      seeds: comma-separated; "": the file's SEEDS.
      shard: "i/n", the i-th of n parts; cells that share a victim stay in one part.
      workers: processes at a time.
      devices: local devices that each cell uses, 0 for all.
      tick: called with the progress.
      say: called with a line for each cell that ends.

    Returns:
      A line for each failed cell, with its error.

    Raises:
      InputError: the file defines no experiments, or an option is out of range.
    """
    grid = load_grid(file, options)
    out = Path(out) if out else grid.out
    chosen = parse_integers("--seeds", seeds, "0,1,2") if seeds else grid.seeds
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}.")
    jobs = _shard([_Job(i, s, cell) for s in chosen for i, cell in enumerate(grid.cells)], shard)
    out.mkdir(parents=True, exist_ok=True)
    _write_plan(grid, out, chosen)
    (out / "logs").mkdir(exist_ok=True)
    failures: list[str] = []
    waiting: deque[_Job] = deque()
    for job in jobs:
        try:
            finished = cells.read(job.cell, job.seed, out) is not None
        except InputError as error:
            failures.append(f"{job.name}: {error}")
            continue
        waiting.extend([] if finished else [job])
    done = len(jobs) - len(waiting)
    say(f"{grid.title}: {len(jobs)} cells, {done - len(failures)} finished before, {len(waiting)} to do")
    tick("grid", done, len(jobs))
    running: dict[subprocess.Popen[bytes], tuple[_Job, Path, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                log = out / "logs" / f"cell-{job.index}-seed-{job.seed}.log"
                running[_start(grid, job, out, devices, log)] = (job, log, time.monotonic())
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                job, log, began = running.pop(process)
                if process.returncode < 0 and job.attempt < _ATTEMPTS:
                    say(f"{job.name}: the worker was killed (signal {-process.returncode}); starting it again")
                    waiting.append(replace(job, attempt=job.attempt + 1))
                    continue
                done += 1
                if process.returncode:
                    failures.append(f"{job.name}: {_last_line(log, process.returncode)}")
                state = "failed" if process.returncode else "finished"
                say(f"[{done}/{len(jobs)}] {job.name}: {state} after {time.monotonic() - began:.0f} s")
                tick("grid", done, len(jobs))
    finally:
        for process in running:
            process.terminate()
    write_summary(grid, out, chosen)
    if failures:
        say(f"{len(failures)} of {len(jobs)} cells failed:\n" + "\n".join(f"  {line}" for line in failures))
    return failures


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
    extra = {"cell": {"index": index, "label": cell.label, "scale": cell.scale, "paper": cell.paper}}
    return cells.carry_out(cell, seed, out, Context(devices), extra)


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


def _start(grid: Grid, job: _Job, out: Path, devices: int, log: Path) -> "subprocess.Popen[bytes]":
    arguments = [str(grid.file), str(job.index), str(job.seed), str(out), str(devices)]
    command = [sys.executable, "-m", "bdjax", "_cell", *arguments]
    if (options := grid.options_record) is not None:
        command.append(json.dumps(options))
    with open(log, "wb") as sink:
        return subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else f'exit code {code}'} (log: {log})"
