"""Cells as tasks of a Ray cluster.

A task starts the cell's process, which ends with it: when a worker is lost its cell ends, too, and is carried out again
elsewhere, from the last epoch of its victim. All machines see the file of experiments, the data and the directory of
results under the same paths, and have the same bdjax installed.
"""

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdjax.errors import InputError
from bdjax.pipelines.backends import ATTEMPTS, CellTask, Ended, Plan, Resources, commands, failure, startable

_MEMORY_SHARE = 0.9
"""Part of a cell's share of a GPU that its process allocates, where several cells share one."""


def run(plan: Plan, resources: Resources, say: Callable[[str], None]) -> Iterator[Ended]:
    """Carry out all cells on a Ray cluster. See :meth:`bdjax.pipelines.backends.Backend.run`.

    Args:
      plan: the cells.
      resources: cores and GPUs of a cell, the cluster's address.
      say: called with lines for the user.

    Yields:
      Each cell when it has ended.

    Raises:
      InputError: Ray is not installed, there is no cluster at the address, or no machine has the resources of a cell.
    """
    ray = _connected(resources, say)
    function = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_carry_out)
    waiting, folder = list(plan.tasks), os.getcwd()
    attempts: Counter[CellTask] = Counter()
    running: dict[Any, tuple[CellTask, float]] = {}
    try:
        while waiting or running:
            training = {task.victim for task, _ in running.values() if task.victim is not None}
            room = resources.workers - len(running) if resources.workers else None
            for task in startable(waiting, training)[:room]:
                waiting.remove(task)
                attempts[task] += 1
                words = plan.command(task, "--attached")[1:]  # of the worker's own Python
                reference = function.remote(words, str(plan.log(task)), folder, _environment(resources))
                running[reference] = (task, time.monotonic())
            for reference in ray.wait(list(running), timeout=1.0)[0]:
                task, began = running.pop(reference)
                try:
                    code, seconds = ray.get(reference)
                except ray.exceptions.RayTaskError as error:  # the cell's process could not be started
                    yield Ended(task, str(error.cause), time.monotonic() - began)
                    continue
                except ray.exceptions.RayError as error:  # the worker or its machine is lost
                    code, seconds = type(error).__name__, time.monotonic() - began
                if (isinstance(code, str) or code < 0) and attempts[task] < ATTEMPTS:
                    say(f"{task.name}: the worker was lost ({code}); starting it again")
                    waiting.append(task)
                    continue
                yield Ended(task, failure(plan.log(task), code) if code else "", seconds)
    finally:
        ray.shutdown()  # ends the tasks that still run, and with them their cells


def describe(plan: Plan, resources: Resources) -> str:
    """The commands of the cells and the resources of each."""
    return f"# each with {resources.cpus} CPU cores and {resources.gpus:g} GPUs\n{commands(plan)}"


def _connected(resources: Resources, say: Callable[[str], None]) -> Any:
    """The module ray, connected to the cluster."""
    try:
        import ray
    except ImportError:
        raise InputError("--backend ray needs Ray. Install it on all machines: pip install 'bdjax[ray]'.") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=resources.address or None, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"there is no Ray cluster at {resources.address or 'RAY_ADDRESS'}: {reason} Start one with `ray start`."
        ) from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    _check_room(nodes, resources)
    gpus = sum(node.get("GPU", 0) for node in nodes)
    say(f"Ray: {len(nodes)} machines, {sum(node.get('CPU', 0) for node in nodes):g} CPU cores, {gpus:g} GPUs")
    if gpus and not resources.gpus:
        say("warning: the cells use no GPU of the cluster. Give each one or a part of one: --gpus-per-cell 1")
    return ray


def _check_room(nodes: Sequence[Mapping[str, float]], resources: Resources) -> None:
    """Refuse a cell that no machine has room for; Ray would wait for a larger one for ever."""
    if not any(node.get("CPU", 0) >= resources.cpus and node.get("GPU", 0) >= resources.gpus for node in nodes):
        raise InputError(
            f"no machine of the Ray cluster has {resources.cpus} CPU cores and {resources.gpus:g} GPUs for a cell. "
            "Lower --cpus-per-cell or --gpus-per-cell."
        )


def _environment(resources: Resources) -> dict[str, str]:
    """Environment variables of a cell's process: its share of a GPU's memory."""
    if not 0 < resources.gpus < 1:
        return {}
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY_SHARE * resources.gpus:.3f}"}


def _carry_out(words: Sequence[str], log: str, folder: str, environment: Mapping[str, str]) -> tuple[int, float]:
    """Start the process of a cell on a worker and wait for it; return its exit code and its seconds."""
    began = time.monotonic()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink:
        process = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, **environment},
        )  # fmt: skip
        return process.wait(), time.monotonic() - began
