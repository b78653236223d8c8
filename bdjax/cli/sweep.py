"""`bdjax sweep`: run a grid of experiments."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._options import DeviceFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags

ORDER = 70
USAGE = "experiments/FILE.py [--seeds 0,1,2] [--shard I/N] [--workers K] [--out DIR]"
SUMMARY = "run the unfinished cells of a grid of experiments"


@dataclass
class Flags(DeviceFlags):
    """Flags of `bdjax sweep`."""

    out: Path | None = None
    """Directory of the results; default: runs/NAME, with the name of the file."""
    seeds: str = ""
    """Comma-separated seeds, such as 0,1,2; default: those of the file."""
    shard: str = "0/1"
    """I/N: run only part I, from 0, of N parts of the grid; cells that share a victim are in the same part."""
    workers: int = 1
    """Number of processes at a time on this machine."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    file = Path(first_argument("sweep", argv))
    options = parse_flags("sweep", (argv[0],), argv[1:], Flags)
    from bdjax.pipelines import sweep
    from bdjax.reports.progress import bar

    with bar() as tick:
        failed = sweep.sweep(
            file, options.out, seeds=options.seeds, shard=options.shard, workers=options.workers,
            devices=options.devices, tick=tick, say=say,
        )  # fmt: skip
    sys.exit(1 if failed else 0)
