"""`bdjax demo`: a small complete run."""

from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._devices import run_context
from bdjax.cli._options import ProfileFlags
from bdjax.cli._output import print_run
from bdjax.cli._parsing import parse_flags
from bdjax.cli._paths import remove_run

ORDER = 10
USAGE = "[--seed S] [--out DIR]"
SUMMARY = "plant and remove a backdoor in a classifier of handwritten digits, with a table and a picture"


@dataclass
class Flags(ProfileFlags):
    """Flags of `bdjax demo`."""

    out: Path = Path("runs/demo")
    """Directory of the run, where an earlier demo is replaced."""
    seed: int = 0
    """Seed of all random numbers."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    options = parse_flags("demo", (), argv, Flags)
    from bdjax.config import demo
    from bdjax.pipelines.run import RunRequest, run

    with run_context(options) as context:
        remove_run(options.out)
        result, directory = run(RunRequest(demo(options.seed), out=options.out), context)
    print_run(result, directory, options.json)
