"""`bdjax sweep`: a grid of experiments."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._common import first, parse, say
from bdjax.cli._options import Device

ORDER = 70
USAGE = "experiments/FILE.py [--seeds 0,1,2] [--shard i/n] [--workers k] [--out DIR]"
SUMMARY = "run what is not finished yet of a grid"


@dataclass
class Flags(Device):
    """Flags of `bdjax sweep`."""

    out: Path | None = None
    """Directory of the results; default runs/FILE's name."""
    seeds: str = ""
    """Comma-separated, such as 0,1,2; default the seeds of the file."""
    shard: str = "0/1"
    """i/n: do only the i-th of n parts of the grid (cells of one victim stay together)."""
    workers: int = 1
    """Processes at a time on this machine."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    file = Path(first("sweep", argv))
    options = parse("sweep", (argv[0],), argv[1:], Flags)
    from bdjax.pipelines import sweep
    from bdjax.reports.progress import bar

    with bar() as tick:
        failed = sweep.sweep(
            file, options.out, seeds=options.seeds, shard=options.shard, workers=options.workers,
            devices=options.devices, tick=tick, say=say,
        )  # fmt: skip
    sys.exit(1 if failed else 0)
