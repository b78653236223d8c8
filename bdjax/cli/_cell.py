"""Run one cell of a sweep in its own process; started by `bdjax sweep`, not by users."""

import json
import os
import threading
from pathlib import Path

from bdjax.cli._devices import prepare_jax

ORDER = 110
USAGE = ""
SUMMARY = ""


def main(argv: list[str]) -> None:
    """Run the cell given by [--attached] FILE INDEX SEED OUT DEVICES [OPTIONS as JSON].

    With --attached the process ends when its stdin is closed, as it is when the process that started it is killed.
    """
    if argv[0] == "--attached":
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        argv = argv[1:]
    from bdjax.pipelines import sweep

    file, index, seed, out, devices, *options = argv
    prepare_jax()
    given = json.loads(options[0]) if options else None
    sweep.run_cell(Path(file), int(index), int(seed), Path(out), int(devices), given)


def _end_with_stdin() -> None:
    """Wait for the end of stdin and end the process without an exit handler, as a signal would."""
    while os.read(0, 1):  # sys.stdin would hold a lock that the interpreter needs when it ends
        pass
    os._exit(1)
