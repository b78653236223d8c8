"""`bdjax bench`: how fast this machine runs what the library does."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._common import check_file, parse, say
from bdjax.cli._options import Common

ORDER = 65
USAGE = "[--suite cpu|gpu] [--only A,B] [--repeats N] [--small] [--no-cold] [--markdown] [--out FILE.json]"
SUMMARY = "images a second, share of the machine's peak, memory and compile time of each workload"


@dataclass
class Flags(Common):
    """Flags of `bdjax bench`."""

    suite: Literal["cpu", "gpu"] = "cpu"
    """Sizes that fit a CPU or an accelerator; the shapes are CIFAR-10's."""
    only: str = ""
    """Names with commas between; * stands for anything: train/small_vgg/*,age. Default all."""
    repeats: int = 5
    """Timed runs of each, after one that compiles."""
    small: bool = False
    """Tiny sizes, to see that everything runs; the numbers mean nothing."""
    markdown: bool = False
    """End with the table as Markdown."""
    cold: bool = True
    """Compile with an empty cache, then again with the filled one; else once, with the cache that there is."""
    limit: float = 1800.0
    """Seconds after which a workload is given up."""
    out: Path | None = None
    """A .json file for the numbers; written anew after each workload."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    options = parse("bench", (), argv, Flags)
    if options.out:
        check_file(options.out, ".json", ".json")
    from bdjax import bench
    from bdjax.reports import bench as report

    bench.chosen(options.only)  # a name that matches nothing is refused before the heading
    rows: list[dict] = []

    def told(row: dict) -> None:
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
        say=told,
    )
    say(report.markdown(result) if options.markdown else report.notes(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        say(json.dumps(result))
