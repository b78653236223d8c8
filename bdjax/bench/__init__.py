"""How fast this machine runs what the library does: every workload in a process of its own, compilation apart.

Each is started twice with a compilation cache of its own, empty the first time: that tells the compile time cold and
cached, and the peak of memory is this workload's alone. `cold=False` starts each once, for when minutes count. Nothing
here imports jax: a parent that holds an accelerator would leave its children none.
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
"""All workloads, in the order in which they are run: KIND/ARGUMENT/..."""


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
      only: names or patterns with commas between, such as "ibau/*,age"; "": all.
      repeats: timed runs of each. limit: seconds after which one is given up. say: is given each row as it is made.
      cold: measure compilation with an empty cache, then with the filled one. False: one process a workload, with the
        cache that JAX_COMPILATION_CACHE_DIR names; "compile" is what that left to do.

    Returns: {"suite", "rows", "env"}; a row that failed has "failed" in place of numbers.
    Raises InputError for a pattern that matches nothing.
    """
    if suite not in SUITES:
        raise InputError(f"--suite must be {' or '.join(SUITES)}, got {suite!r}.")
    if repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {repeats}.")
    rows: list[dict[str, Any]] = []
    env: dict[str, Any] = {}
    for name in chosen(only):
        with tempfile.TemporaryDirectory() as cache:
            given = {"JAX_COMPILATION_CACHE_DIR": cache} if cold else {}
            try:
                row = (
                    _startup(repeats, given, limit)
                    if name == STARTUP
                    else _row(name, suite, repeats, small, given, limit, cold)
                )
            except (subprocess.TimeoutExpired, RuntimeError) as error:
                told = f"longer than {limit:g} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
                row = {"name": name, "failed": told}
        env = row.pop("env", None) or env
        rows.append(row)
        say(row)
    return {"kind": "bench", "suite": suite, "small": small, "rows": rows, "env": env, "xla_flags": _flags()}


def chosen(only: str, known: Sequence[str] = NAMES) -> list[str]:
    """The names that match; all for "". Raises InputError for a pattern that matches none."""
    patterns = parse_names(only)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(f"--only {pattern} matches no workload. Known: {', '.join(known)}.")
    return [name for name in known if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def _row(
    name: str, suite: str, repeats: int, small: bool, given: dict[str, str], limit: float, cold: bool
) -> dict[str, Any]:
    size = "small" if small else "full"
    row = json.loads(_ask(["measure", name, suite, str(repeats), size], given, limit).splitlines()[-1])
    if not cold:
        return row
    again = json.loads(_ask(["measure", name, suite, "0", size], given, limit).splitlines()[-1])
    return row | {"compile_cached": again["compile"]}


def _startup(repeats: int, given: dict[str, str], limit: float) -> dict[str, Any]:
    """Seconds from starting a process to the end of its first training step; the first fills the cache."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        _ask(["first-step"], given, limit)
        seconds.append(time.perf_counter() - begin)
    cold, *seconds = seconds
    row = {"name": STARTUP, "unit": "starts", "units": 1, "seconds": seconds, "n": repeats, "cold": cold}
    return row | {"median": median(seconds), "rate": 1 / median(seconds)}


def _ask(arguments: list[str], given: dict[str, str], limit: float) -> str:
    """What a worker says. Raises RuntimeError with its last line when it fails."""
    command = [sys.executable, "-m", "bdjax", "_bench", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit, env={**os.environ, **given}, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def _flags() -> str:
    return os.environ.get("XLA_FLAGS", "")
