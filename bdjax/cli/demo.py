"""`bdjax demo`: a small run that shows the whole job."""

from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._common import finish, parse, ready, remove_run
from bdjax.cli._options import Traced

ORDER = 10
USAGE = "[--seed S] [--out DIR]"
SUMMARY = "the main job on handwritten digits, with a table and a picture"


@dataclass
class Flags(Traced):
    """Flags of `bdjax demo`."""

    out: Path = Path("runs/demo")
    """Directory of the run; an earlier demo there is replaced."""
    seed: int = 0
    """Everything random follows from it."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    options = parse("demo", (), argv, Flags)
    from bdjax.config import demo
    from bdjax.pipelines import run

    with ready(options) as context:
        remove_run(options.out)
        result, directory = run.run(demo(options.seed), Path("runs"), options.out, context)
    finish(result, directory, options.json)
