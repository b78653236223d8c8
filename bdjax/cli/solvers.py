"""`bdjax solvers`: the comparison of hypergradient solvers, as a table, a picture and JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._common import first, parse, ready, say
from bdjax.cli._options import Device
from bdjax.errors import InputError
from bdjax.text import parse_integers

ORDER = 60
USAGE = (
    "VICTIM_DIR [--solvers a,b:RIDGE] [--iterations 5,20] [--no-rounds] [--defense.FIELD ..] [--split.FIELD ..]"
    " [--out DIR]"
)
SUMMARY = "compare hypergradient solvers on VICTIM_DIR: accuracy, cost, one round of I-BAU with each"


@dataclass
class Flags(Device):
    """Flags of `bdjax solvers`."""

    solvers: str = ""
    """Comma-separated names of hypergradient solvers, NAME or NAME:RIDGE; default most of them (docs/solvers.md)."""
    iterations: str = "5,20"
    """Comma-separated values of K."""
    rounds: bool = True
    """Clean the victim by one round of I-BAU with each solver and measure it."""
    repeats: int = 3
    """Timed calls of each hypergradient; the median counts."""
    test_size: int = 0
    """Measure on the first so many held-out images; 0: all."""
    dataset: str | None = None
    """Where the victim's data set lies now, if it has moved."""
    seed: int | None = None
    """Of the defense; default the victim's."""
    out: Path | None = None
    """Directory of solvers.json and solvers.png; default runs/solvers-HASH of the victim."""
    force: bool = False
    """Replace an earlier comparison that stands there."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    victim = Path(first("solvers", argv))
    rest = argv[1:]
    if not any(word.split("=")[0] == "--defense.schedule" for word in rest):
        rest = ["--defense.schedule", "release", *rest]  # solvers are compared on one perturbation
    options = parse("solvers", (argv[0],), rest, Flags, defense="ibau", split=True)
    from bdjax.io import checkpoint
    from bdjax.pipelines import solver_comparison
    from bdjax.reports import solvers

    out = options.out or Path("runs") / f"solvers-{checkpoint.read_record(victim)['hash'][:16]}"
    if (out / "solvers.json").exists() and not options.force:
        raise InputError(f"{out} holds a comparison already. Choose another --out, or --force to replace it.")
    chosen = tuple(options.solvers.split(",")) if options.solvers else solver_comparison.DEFAULT
    iterations = parse_integers("--iterations", options.iterations, "5,20")
    with ready(options) as context:
        result = solver_comparison.compare(
            victim, solvers=chosen, iterations=iterations, config=options.defense,
            split=options.split, seed=options.seed, dataset=options.dataset, rounds=None if options.rounds else (),
            test_size=options.test_size, repeats=options.repeats, context=context,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / "solvers.json", json.dumps(result, indent=1) + "\n")
    say(solvers.table(result))
    say(f"picture: {solvers.draw(result, out / 'solvers.png')}\nresult:  {out / 'solvers.json'}")
    if options.json:
        say(json.dumps(result))
