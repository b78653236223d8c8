"""Measure one workload of `bdjax bench` in its own process; started by `bdjax bench`, not by users."""

import json
import os

from bdjax.cli._devices import prepare_jax
from bdjax.cli._output import say

ORDER = 111
USAGE = ""
SUMMARY = ""


def main(argv: list[str]) -> None:
    """Run `measure NAME SUITE REPEATS small|full` (REPEATS 0: only the call that compiles) or `first-step`."""
    prepare_jax()
    from bdjax.bench import _measure

    if argv[0] == "first-step":
        _measure.first_step(say)
        os._exit(0)  # the time to shut down is not part of a start
    name, suite, repeats, size = argv[1:]
    if int(repeats):
        row = _measure.measure(name, suite, int(repeats), size == "small")
    else:
        row = _measure.first_call(name, suite, size == "small")[0]
    say(json.dumps(row))
