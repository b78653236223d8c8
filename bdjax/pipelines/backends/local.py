"""Cells as processes of this machine."""

import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

from bdjax.pipelines.backends import ATTEMPTS, CellTask, Ended, Plan, Resources, commands, failure


def run(plan: Plan, resources: Resources, say: Callable[[str], None]) -> Iterator[Ended]:
    """Carry out all cells, `resources.workers` at a time. See :meth:`bdjax.pipelines.backends.Backend.run`.

    Args:
      plan: the cells.
      resources: the number of processes.
      say: called with lines for the user.

    Yields:
      Each cell when it has ended.
    """
    waiting = deque(plan.tasks)
    attempts: Counter[CellTask] = Counter()
    running: dict[subprocess.Popen[bytes], tuple[CellTask, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max(resources.workers, 1):
                task = waiting.popleft()
                attempts[task] += 1
                running[_start(plan, task)] = (task, time.monotonic())
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                task, began = running.pop(process)
                if process.returncode < 0 and attempts[task] < ATTEMPTS:
                    say(f"{task.name}: the worker was killed (signal {-process.returncode}); starting it again")
                    waiting.append(task)
                    continue
                error = failure(plan.log(task), process.returncode) if process.returncode else ""
                yield Ended(task, error, time.monotonic() - began)
    finally:
        for process in running:
            process.terminate()


def describe(plan: Plan, resources: Resources) -> str:
    """The commands of the cells."""
    return commands(plan)


def _start(plan: Plan, task: CellTask) -> "subprocess.Popen[bytes]":
    with open(plan.log(task), "wb") as sink:
        return subprocess.Popen(plan.command(task), stdout=sink, stderr=subprocess.STDOUT)
