"""Cells as tasks of Slurm job arrays.

The scripts are written to OUT/slurm and submitted with sbatch: first the cells that train a victim, one for each, then
the others, which start when these have ended. A cell leaves its exit code beside its log. All machines see the file of
experiments, the data and the directory of results under the same paths.
"""

import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdjax.errors import InputError
from bdjax.pipelines.backends import ATTEMPTS, CellTask, Ended, Plan, Resources, failure, startable
from bdjax.text import visible

_LARGEST_ARRAY = 1000
"""Tasks of one array; Slurm's default MaxArraySize is 1001."""
_KILLED = 128
"""Exit codes from here on are a shell's for a process that a signal ended."""
_POLL_SECONDS = 15.0
_GRACE_SECONDS = 60.0
"""How long an exit code is waited for when the queue no longer lists its array: network file systems cache folders."""


@dataclass(frozen=True)
class _Array:
    """Cells of one job array."""

    name: str
    tasks: tuple[CellTask, ...]
    after_first: bool
    """Whether it waits for the arrays that train the victims."""


def run(plan: Plan, resources: Resources, say: Callable[[str], None]) -> Iterator[Ended]:
    """Submit all cells and wait for them. See :meth:`bdjax.pipelines.backends.Backend.run`.

    Args:
      plan: the cells.
      resources: cores and GPUs of a cell, options of sbatch.
      say: called with lines for the user.

    Yields:
      Each cell when it has ended.

    Raises:
      InputError: sbatch is missing or refuses a script, or earlier arrays of this directory are still in the queue.
    """
    folder = plan.out.resolve() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "submitted"
    if record.exists() and _queued(ids := record.read_text().split()):
        raise InputError(
            f"arrays of {plan.out} are still in the queue: {' '.join(ids)}. Wait for them, or stop them with "
            f"`scancel {' '.join(ids)}`."
        )
    waiting = {_exit_file(plan, task): task for task in plan.tasks}
    for attempt in range(1, ATTEMPTS + 1):
        for path in waiting:
            path.unlink(missing_ok=True)
        ids = _submit(plan, tuple(waiting.values()), resources, folder, attempt)
        record.write_text(" ".join(ids) + "\n")
        say(f"Slurm: {len(waiting)} cells in the arrays {' '.join(ids)}; they go on when this command is stopped")
        yield from _wait(plan, waiting, ids)
        if not waiting:
            return
        if attempt < ATTEMPTS:
            say(f"{len(waiting)} cells were killed or lost; submitting them again")
    for task in waiting.values():
        yield Ended(task, failure(plan.log(task), "none: Slurm or a signal ended it"), 0.0)


def describe(plan: Plan, resources: Resources) -> str:
    """The scripts that are submitted, in order."""
    scripts = []
    for array in _arrays(plan.tasks, attempt=1):
        dependency = " --dependency=afterany:THE ARRAYS BEFORE" if array.after_first else ""
        scripts.append(f"# sbatch{dependency} {array.name}.sh\n{_script(plan, array, resources)}")
    return "\n".join(scripts)


def _arrays(tasks: Sequence[CellTask], attempt: int) -> list[_Array]:
    """The cells in arrays: first those that train a victim for others or need none, then the others."""
    first = startable(tasks, ())
    chosen = set(first)
    arrays = []
    for kind, part in (("first", first), ("others", [task for task in tasks if task not in chosen])):
        for start in range(0, len(part), _LARGEST_ARRAY):
            name = f"{kind}-{start // _LARGEST_ARRAY}-try-{attempt}"
            arrays.append(_Array(name, tuple(part[start : start + _LARGEST_ARRAY]), kind == "others"))
    return arrays


def _script(plan: Plan, array: _Array, resources: Resources) -> str:
    """The script of an array: its cells, and what one of its tasks does."""
    at_once = f"%{resources.workers}" if resources.workers else ""
    output = plan.out.resolve() / "slurm" / array.name
    options = [
        f"--job-name=bdjax-{_word(plan.file.stem)}", f"--array=0-{len(array.tasks) - 1}{at_once}",
        f"--cpus-per-task={resources.cpus}", f"--output={shlex.quote(str(output))}-%a.out",
        "--requeue", *([f"--gres=gpu:{resources.gpus:g}"] if resources.gpus else []), *shlex.split(resources.sbatch),
    ]  # fmt: skip
    cells = [f'  "{task.index} {task.seed}"  # {visible(task.name)}' for task in array.tasks]
    return "\n".join([
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        "cells=(",
        *cells,
        ")",
        'read -r index seed <<< "${cells[$SLURM_ARRAY_TASK_ID]}"',
        f"base={shlex.quote(str(plan.out.resolve() / 'logs'))}/cell-$index-seed-$seed",
        'began=$(date +%s)',
        f'{shlex.join(plan.program())} "$index" "$seed" {shlex.join(plan.settings())} > "$base.log" 2>&1',
        "code=$?",
        'echo "$code $(( $(date +%s) - began ))" > "$base.exit.partial" && mv "$base.exit.partial" "$base.exit"',
        "exit $code",
        "",
    ])  # fmt: skip


def _word(text: str) -> str:
    """A text as one word of letters, digits and signs that need no quotes."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in text)


def _submit(plan: Plan, tasks: Sequence[CellTask], resources: Resources, folder: Path, attempt: int) -> list[str]:
    """Write and submit the arrays of some cells; return the ids of the jobs."""
    first: list[str] = []
    others: list[str] = []
    for array in _arrays(tasks, attempt):
        path = folder / f"{array.name}.sh"
        path.write_text(_script(plan, array, resources))
        dependency = [f"--dependency=afterany:{':'.join(first)}"] if array.after_first else []
        done = _call("sbatch", "--parsable", *dependency, str(path))
        if done.returncode:
            raise InputError(f"sbatch refused {path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        (others if array.after_first else first).append(done.stdout.strip().partition(";")[0])
    return first + others


def _exit_file(plan: Plan, task: CellTask) -> Path:
    """The file with a cell's exit code and its seconds."""
    return plan.log(task).with_suffix(".exit")


def _wait(plan: Plan, waiting: dict[Path, CellTask], ids: Sequence[str]) -> Iterator[Ended]:
    """Yield the cells that end with an exit code of their own, and remove them from `waiting`.

    Returns when all have ended, or the queue has none of the arrays.
    """
    pending = dict(waiting)
    gone: float | None = None
    while pending:
        time.sleep(_POLL_SECONDS)
        present = {path.name for path in (plan.out / "logs").iterdir()}
        for path in [path for path in pending if path.name in present]:
            code, seconds = path.read_text().split()
            task = pending.pop(path)
            if int(code) < _KILLED:
                del waiting[path]
                yield Ended(task, "" if code == "0" else failure(plan.log(task), code), float(seconds))
        if _queued(ids):
            gone = None
        elif gone is None:
            gone = time.monotonic()
        elif time.monotonic() - gone > _GRACE_SECONDS:
            return


def _queued(ids: Sequence[str]) -> bool:
    """Whether Slurm's queue has one of the jobs; also true when it does not answer."""
    done = _call("squeue", "--noheader", "--format=%i", f"--jobs={','.join(ids)}")
    if done.returncode:
        return "Invalid job id" not in done.stderr
    return bool(done.stdout.strip())


def _call(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of Slurm. Raises InputError when it is not installed."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(
            f"there is no {words[0]} on the PATH. Run this where jobs are submitted, or print the scripts with --print."
        ) from None
