"""Steps one after the other, each in a process of its own with a limit of time, within a budget for all of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerator import records

LEAST = 25.0
"""Seconds that must be left of the budget for a step to begin."""
RESERVE = 5.0
"""Seconds of the budget that no step is given: the archives are written in them."""
_GRACE = 2.0  # seconds between asking a process to end and killing it


@dataclass(frozen=True)
class Step:
    """One entry of a schedule."""

    name: str
    """Also the module-level function that carries it out (:mod:`accelerator.steps`)."""
    limit: float
    """Seconds after which it is stopped."""


STEPS = (
    Step("machine", 45),
    Step("parity", 110),
    Step("bench", 160),
    Step("compare", 110),
    Step("ibau", 130),
    Step("bibau", 130),
    Step("age", 80),
    Step("baeraser", 90),
)
"""In order of worth: what comes first is done even where nothing else is."""


def carry_out(
    steps: Sequence[Step],
    command: Callable[[Step, float], list[str]],
    *,
    budget: float,
    file: Path,
    logs: Path,
    env: Mapping[str, str] | None = None,
    began: float | None = None,
    least: float = LEAST,
) -> None:
    """Run the steps; append to `file` how each ended: ok, skipped, timeout or failed, with its seconds and the reason.

    Args:
      steps: in the order in which they run.
      command: `command(step, deadline)` gives the command line; the deadline is as of time.time().
      budget: seconds for everything since `began`.
      file: of the records.
      logs: directory of the output of the steps.
      env: environment of the processes.
      began: as of time.time(); None: now.
      least: see :data:`LEAST`.
    """
    began = time.time() if began is None else began
    logs.mkdir(parents=True, exist_ok=True)
    for step in steps:
        left = budget - (time.time() - began)
        if left < least:
            _tell(file, step, "skipped", 0.0, f"{max(left, 0):.0f} s of the budget are left, fewer than {least:g}")
            continue
        limit = min(step.limit, left - RESERVE)
        begin = time.time()
        status, reason = _one(command(step, begin + limit), limit, logs / f"{step.name}.log", env)
        _tell(file, step, status, time.time() - begin, reason, limit=limit)


def _one(command: list[str], limit: float, log: Path, env: Mapping[str, str] | None) -> tuple[str, str]:
    """(status, reason) of one process, which is gone with all of its children when this returns."""
    with log.open("w") as file:
        try:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        except OSError as error:
            return "failed", str(error)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timeout", f"longer than {limit:.0f} s"
        finally:
            end_group(process)
    if code == 0:
        return "ok", ""
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    return "skipped" if code == records.SKIPPED else "failed", lines[-1]


def end_group(process: subprocess.Popen) -> None:
    """Stop a process that leads a session, and whatever it started there: first by SIGTERM, then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def _tell(file: Path, step: Step, status: str, seconds: float, reason: str, **facts: Any) -> None:
    record = {"kind": "step", "step": step.name, "status": status, "seconds": seconds, "reason": reason, **facts}
    records.append(file, record)
    sys.stdout.write(f"{step.name:10s}{status:9s}{seconds:7.1f} s  {reason}\n")
    sys.stdout.flush()
