"""`bdjax solvers`: compare hypergradient solvers, as a table, a picture and JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._devices import run_context
from bdjax.cli._options import DeviceFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.errors import InputError
from bdjax.text import parse_integers

ORDER = 60
USAGE = (
    "VICTIM_DIR [--solvers A,B:RIDGE] [--iterations 5,20] [--no-rounds] [--defense.FIELD ..] [--split.FIELD ..]"
    " [--out DIR]"
)
SUMMARY = "compare hypergradient solvers on VICTIM_DIR: accuracy, cost, one round of I-BAU with each"


@dataclass
class Flags(DeviceFlags):
    """Flags of `bdjax solvers`."""

    solvers: str = ""
    """Comma-separated hypergradient solvers, NAME or NAME:RIDGE; default: most of them (docs/solvers.md)."""
    iterations: str = "5,20"
    """Comma-separated numbers of iterations K."""
    rounds: bool = True
    """Also purify the victim by one round of I-BAU with each solver, and measure the result."""
    repeats: int = 3
    """Number of timed calls of each hypergradient, of which the median is reported."""
    test_size: int = 0
    """Number of held-out images to measure on, in file order; 0: all."""
    dataset: str | None = None
    """Data set of the victim, if it has moved: digits, npz:PATH, folder:PATH or tfds:NAME."""
    seed: int | None = None
    """Seed of the defense; default: the victim's."""
    out: Path | None = None
    """Directory of solvers.json and solvers.png; default: runs/solvers-HASH, with the hash of the victim."""
    force: bool = False
    """Replace an earlier comparison."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    victim = Path(first_argument("solvers", argv))
    rest = argv[1:]
    if not any(argument.split("=")[0] == "--defense.schedule" for argument in rest):
        rest = ["--defense.schedule", "release", *rest]  # solvers are compared on one perturbation
    options = parse_flags("solvers", (argv[0],), rest, Flags, defense="ibau", split=True)
    from bdjax.io import checkpoint
    from bdjax.pipelines import solver_comparison
    from bdjax.reports import solvers

    out = options.out or Path("runs") / f"solvers-{checkpoint.read_record(victim)['hash'][:16]}"
    if (out / "solvers.json").exists() and not options.force:
        raise InputError(f"{out} contains a comparison already. Choose another --out, or --force to replace it.")
    names = tuple(options.solvers.split(",")) if options.solvers else solver_comparison.DEFAULT
    iterations = parse_integers("--iterations", options.iterations, "5,20")
    with run_context(options) as context:
        request = solver_comparison.ComparisonRequest(
            victim, names, iterations, options.defense, options.split, options.seed, options.dataset,
            None if options.rounds else (), options.test_size, options.repeats,
        )  # fmt: skip
        result = solver_comparison.compare(request, context)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / "solvers.json", json.dumps(result, indent=1) + "\n")
    say(solvers.table(result))
    say(f"picture: {solvers.draw(result, out / 'solvers.png')}\nresult:  {out / 'solvers.json'}")
    if options.json:
        say(json.dumps(result))
