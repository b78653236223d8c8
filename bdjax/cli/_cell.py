"""Run one cell of a sweep in its own process; started by `bdjax sweep`, not by users."""

import json
from pathlib import Path

from bdjax.cli._devices import prepare_jax

ORDER = 110
USAGE = ""
SUMMARY = ""


def main(argv: list[str]) -> None:
    """Run the cell given by FILE INDEX SEED OUT DEVICES [OPTIONS as JSON]."""
    from bdjax.pipelines import sweep

    file, index, seed, out, devices, *options = argv
    prepare_jax()
    given = json.loads(options[0]) if options else None
    sweep.run_cell(Path(file), int(index), int(seed), Path(out), int(devices), given)
