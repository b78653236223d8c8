"""`bdjax leaderboard`: a static page of many results."""

from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags

ORDER = 85
USAGE = "DIR [DIR ..] [--out leaderboard]"
SUMMARY = "make a page of all results below DIRs, sortable, with plots, and their records as CSV and Parquet"


@dataclass
class Flags:
    """Flags of `bdjax leaderboard`."""

    out: Path = Path("leaderboard")
    """Folder that gets index.html, records.csv and, with pyarrow (pip install 'bdjax[parquet]'), records.parquet."""
    title: str = "Backdoor defenses"
    """Heading of the page."""
    copy: bool = False
    """Copy the result files that the page links to into OUT/results, so that the folder can be moved or published."""
    papers: Path | None = None
    """Directory of the papers' CSV tables; default: experiments/papers, if it is there."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    first_argument("leaderboard", argv)
    flags = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    options = parse_flags("leaderboard", tuple(argv[:flags]), argv[flags:], Flags)
    from bdjax.reports.leaderboard import records, site

    found = records.read([Path(word) for word in argv[:flags]], options.papers)
    files = site.write(found, options.out, options.title, options.copy)
    say("\n".join(map(str, files)))
    if len(files) < 3:
        say("no records.parquet: pyarrow is not installed (pip install 'bdjax[parquet]')")
