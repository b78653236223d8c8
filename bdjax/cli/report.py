"""`bdjax report`: a table of many results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags

ORDER = 80
USAGE = "DIR [--csv | --markdown]"
SUMMARY = "tabulate mean, std and n of the results below DIR, beside the papers' numbers"


@dataclass
class Flags:
    """Flags of `bdjax report`."""

    csv: bool = False
    """Print comma-separated values instead of plain text."""
    markdown: bool = False
    """Print a Markdown table instead of plain text."""
    papers: Path | None = None
    """Directory of the papers' CSV tables; default: experiments/papers."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    directory = Path(first_argument("report", argv))
    options = parse_flags("report", (argv[0],), argv[1:], Flags)
    from bdjax.reports import table

    table_format: Literal["text", "csv", "markdown"] = (
        "csv" if options.csv else "markdown" if options.markdown else "text"
    )
    say(table.report(directory, table_format, options.papers))
