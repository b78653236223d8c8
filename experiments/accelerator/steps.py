"""One step in a process of its own.

python -m accelerator.steps NAME DEADLINE --records FILE --work DIR --keep DIR [--images FILE] [--smoke]
"""

import argparse
import importlib
import signal
import sys
from pathlib import Path

from accelerator.records import SKIPPED, Run, SkipStep

MODULES = {
    "machine": "machine",
    "parity": "parity",
    "bench": "speed",
    "compare": "speed",
    "ibau": "papers",
    "bibau": "papers",
    "age": "papers",
    "baeraser": "papers",
}
"""Where the function of a step's name is."""


def main(argv: list[str]) -> None:
    """Carry out one step; exit with records.SKIPPED where it cannot be done here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(MODULES))
    parser.add_argument("deadline", type=float)
    for name in ("records", "work", "keep"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--images", default="")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped at its limit"))  # so that `finally` is carried out
    run = Run(
        given.name, given.records, given.keep, given.work, given.images, given.deadline, given.smoke, given.torch_python
    )
    try:
        getattr(importlib.import_module(f"accelerator.{MODULES[given.name]}"), given.name)(run)
    except SkipStep as reason:
        sys.stdout.write(f"{reason}\n")
        sys.exit(SKIPPED)


if __name__ == "__main__":
    main(sys.argv[1:])
