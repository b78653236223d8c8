"""One workload of `bdjax bench` in a process of its own (not for people)."""

import json
import os

from bdjax.cli._common import prepare_jax, say

ORDER = 111
USAGE = ""
SUMMARY = ""


def main(argv: list[str]) -> None:
    """measure NAME SUITE REPEATS small|full (0 repeats: only the call that compiles), or first-step."""
    prepare_jax()
    from bdjax.bench import _measure

    if argv[0] == "first-step":
        _measure.first_step(say)
        os._exit(0)  # tearing down is no part of a start
    name, suite, repeats, size = argv[1:]
    if int(repeats):
        row = _measure.measure(name, suite, int(repeats), size == "small")
    else:
        row = _measure.first_call(name, suite, size == "small")[0]
    say(json.dumps(row))
