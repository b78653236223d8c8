"""`bdjax audit`: is there a backdoor in a model, and towards which class?"""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._common import first, parse, ready, remarks, say
from bdjax.cli._options import Device
from bdjax.text import parse_names

ORDER = 41
USAGE = "DIR [--clean DATA] [--methods A,B] [--size N] [--seed S] [--out DIR]"
SUMMARY = "is there a backdoor in the model in DIR, and towards which class?"


@dataclass
class Flags(Device):
    """Flags of `bdjax audit`."""

    clean: str | None = None
    """Clean images, labelled: digits, npz:PATH, folder:PATH or tfds:NAME; its test split is used. Default the data set
    that the model was trained on; an imported model needs one."""
    methods: str = ""
    """Names with commas between; default all defenses that audit, but baeraser, which takes minutes on a CPU."""
    size: int | None = None
    """Clean images to use; default 1,000, or all if there are fewer."""
    seed: int = 0
    """Draws the images, and the methods' random numbers."""
    out: Path | None = None
    """Directory of audit.json and audit.png; those that stand there are replaced. Default DIR-audit."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    directory = Path(first("audit", argv))
    options = parse("audit", (str(directory),), argv[1:], Flags)
    from bdjax.io import checkpoint
    from bdjax.pipelines import audit
    from bdjax.reports import audit as report

    with ready(options) as context:
        result, arrays = audit.audit(
            directory,
            options.clean,
            parse_names(options.methods),
            size=options.size,
            seed=options.seed,
            context=context,
        )
        out = options.out or directory.with_name(f"{directory.name}-audit")
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(out / "audit.json", json.dumps(result, indent=1) + "\n")
        report.draw(result, arrays, out / "audit.png")
    say(report.table(result))
    remarks(result)
    say(f"evidence: {out / 'audit.json'}, {out / 'audit.png'}")
    if options.json:
        say(json.dumps(result))
