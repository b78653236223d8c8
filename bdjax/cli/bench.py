"""`bdjax bench`: measure how fast the library runs on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._options import CommonFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import parse_flags
from bdjax.cli._paths import check_output_file

ORDER = 65
USAGE = "[--suite cpu|gpu] [--only A,B] [--repeats N] [--small] [--no-cold] [--markdown] [--out FILE.json]"
SUMMARY = "measure images per second, share of peak, memory and compile time of each workload"


@dataclass
class Flags(CommonFlags):
    """Flags of `bdjax bench`."""

    suite: Literal["cpu", "gpu"] = "cpu"
    """Batch and data sizes for a CPU or for an accelerator; images have CIFAR-10's shape."""
    only: str = ""
    """Comma-separated names of workloads, where * matches any text: train/small_vgg/*,age; default: all."""
    repeats: int = 5
    """Number of timed runs of each workload, after one that compiles."""
    small: bool = False
    """Use tiny sizes to check that everything runs; the numbers are meaningless."""
    markdown: bool = False
    """Print the table as Markdown at the end."""
    cold: bool = True
    """Measure compilation with an empty and with a filled cache; --no-cold: once, with the present cache."""
    limit: float = 1800.0
    """Time limit of each workload in seconds."""
    out: Path | None = None
    """File of the numbers, whose name ends in .json; updated after each workload."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    options = parse_flags("bench", (), argv, Flags)
    if options.out:
        check_output_file(options.out, ".json", ".json")
    from bdjax import bench
    from bdjax.reports import bench as report

    bench.chosen(options.only)  # raises for a name that matches nothing, before the heading is printed
    rows: list[dict] = []

    def record_row(row: dict) -> None:
        rows.append(row)
        say(report.line(row))
        if options.out:
            options.out.write_text(json.dumps({"kind": "bench", "suite": options.suite, "rows": rows}, indent=1) + "\n")

    say(report.HEADING)
    result = bench.bench(
        options.suite,
        options.only,
        repeats=options.repeats,
        small=options.small,
        limit=options.limit,
        cold=options.cold,
        say=record_row,
    )
    say(report.markdown(result) if options.markdown else report.notes(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        say(json.dumps(result))
