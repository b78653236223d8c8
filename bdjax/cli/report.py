"""`bdjax report`: the table of many results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._common import first, parse, say

ORDER = 80
USAGE = "DIR [--csv | --markdown]"
SUMMARY = "mean, std and n of the results below DIR, beside the papers'"


@dataclass
class Flags:
    """Flags of `bdjax report`."""

    csv: bool = False
    """Comma-separated values."""
    markdown: bool = False
    """A Markdown table (the default is plain text)."""
    papers: Path | None = None
    """Folder of the papers' CSV tables; default experiments/papers."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    directory = Path(first("report", argv))
    options = parse("report", (argv[0],), argv[1:], Flags)
    from bdjax.reports import table

    form: Literal["text", "csv", "markdown"] = "csv" if options.csv else "markdown" if options.markdown else "text"
    say(table.report(directory, form, options.papers))
