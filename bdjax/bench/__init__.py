"""Benchmark of the library on this machine, with each workload in its own process and compilation timed separately.

Each workload runs in two processes with a new compilation cache, which gives the compile time with an empty and with a
filled cache and the peak memory of this workload alone. `cold=False` starts one process per workload and takes less
time. This module does not import jax, because a parent process that holds an accelerator would block its children.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

from bdjax.errors import InputError
from bdjax.text import parse_names

STARTUP = "startup"
SUITES = ("cpu", "gpu")
_MODELS = ("small_vgg", "resnet18")
NAMES = (
    *(
        f"train/{model}/{attack}/{dtype}"
        for model in _MODELS
        for attack in ("clean", "badnets", "wanet", "iad")
        for dtype in ("float32", "bfloat16")
    ),
    *(f"evaluate/{model}" for model in _MODELS),
    *("ibau/release", "ibau/paper", "bibau", "age", "inversion"),
    *("many/loop", "many/vmap", "many/devices"),
    *("trigger/badnets", "trigger/blended", "trigger/sig"),
    STARTUP,
)
"""All workloads in the order of their execution, named KIND/ARGUMENT/..."""


def bench(
    suite: str = "cpu",
    only: str = "",
    *,
    repeats: int = 5,
    small: bool = False,
    limit: float = 1800.0,
    cold: bool = True,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure the workloads of a suite whose names match.

    Args:
      suite: "cpu" or "gpu", which determines the sizes of the workloads.
      only: comma-separated names or patterns such as "ibau/*,age"; "": all workloads.
      repeats: number of timed runs of each workload, at least 1.
      small: use tiny sizes, to test the benchmark itself.
      limit: time limit of one process in seconds.
      cold: measure compilation with an empty cache, then with the filled one. False: one process per workload, with
        the cache in JAX_COMPILATION_CACHE_DIR; "compile" is then the remaining compile time.
      say: called with each row when it is complete.

    Returns:
      {"kind", "suite", "small", "rows", "env", "xla_flags"}; a failed row has "failed" in place of numbers.

    Raises:
      InputError: when the suite is unknown, `repeats` is less than 1, or a pattern matches no workload.
    """
    if suite not in SUITES:
        raise InputError(f"--suite must be {' or '.join(SUITES)}, got {suite!r}.")
    if repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {repeats}.")
    rows: list[dict[str, Any]] = []
    env: dict[str, Any] = {}
    for name in chosen(only):
        with tempfile.TemporaryDirectory() as cache:
            variables = {"JAX_COMPILATION_CACHE_DIR": cache} if cold else {}
            try:
                row = (
                    _startup(repeats, variables, limit)
                    if name == STARTUP
                    else _row(name, suite, repeats, small, variables, limit, cold)
                )
            except (subprocess.TimeoutExpired, RuntimeError) as error:
                timed_out = isinstance(error, subprocess.TimeoutExpired)
                row = {"name": name, "failed": f"longer than {limit:g} s" if timed_out else str(error)}
        env = row.pop("env", None) or env
        rows.append(row)
        say(row)
    return {"kind": "bench", "suite": suite, "small": small, "rows": rows, "env": env, "xla_flags": _flags()}


def chosen(only: str, known: Sequence[str] = NAMES) -> list[str]:
    """Return the names that match a comma-separated list of patterns, all names for "".

    Raises InputError for a pattern that matches no name.
    """
    patterns = parse_names(only)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(f"--only {pattern} matches no workload. Known: {', '.join(known)}.")
    return [name for name in known if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def _row(
    name: str, suite: str, repeats: int, small: bool, variables: dict[str, str], limit: float, cold: bool
) -> dict[str, Any]:
    """Measure one workload; `variables` are environment variables of its process."""
    size = "small" if small else "full"
    row = json.loads(_run_worker(["measure", name, suite, str(repeats), size], variables, limit).splitlines()[-1])
    if not cold:
        return row
    cached = json.loads(_run_worker(["measure", name, suite, "0", size], variables, limit).splitlines()[-1])
    return row | {"compile_cached": cached["compile"]}


def _startup(repeats: int, variables: dict[str, str], limit: float) -> dict[str, Any]:
    """Measure the seconds from the start of a process to its first training step; the first run fills the cache."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        _run_worker(["first-step"], variables, limit)
        seconds.append(time.perf_counter() - begin)
    cold, *seconds = seconds
    row = {"name": STARTUP, "unit": "starts", "units": 1, "seconds": seconds, "n": repeats, "cold": cold}
    return row | {"median": median(seconds), "rate": 1 / median(seconds)}


def _run_worker(arguments: list[str], variables: dict[str, str], limit: float) -> str:
    """Run a worker process and return its output. Raises RuntimeError with its last error line when it fails."""
    command = [sys.executable, "-m", "bdjax", "_bench", *arguments]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=limit, env={**os.environ, **variables}, check=False
    )
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return process.stdout


def _flags() -> str:
    return os.environ.get("XLA_FLAGS", "")
