"""`bdjax purify`: from a weight file to a cleaned weight file and a report, in one command."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._common import chosen, first, import_options, parse, ready, say
from bdjax.cli._options import Device, Foreign
from bdjax.text import parse_names

ORDER = 44
USAGE = "FILE|DIR [--model M] --clean DATA [--defense D --defense.FIELD ..] [--input-mean ..] --out DIR"
SUMMARY = "import, audit, clean, compare and export in one go, with a report"


@dataclass(kw_only=True)
class Flags(Foreign, Device):
    """Flags of `bdjax purify`; those of `bdjax import` are for a FILE."""

    out: Path
    """Directory of everything: model, purified, purified.pt or .pth or .safetensors, audit.json, pictures, report.html,
    result.json. What stands there of the very same call is finished; anything else is left alone."""
    clean: str | None = None
    """Clean images, labelled: digits, npz:PATH, folder:PATH or tfds:NAME; a hundred will do. Default the data set that
    a directory's model was trained on."""
    images: Literal["test", "all"] | None = None
    """Which of them: the test split, or all; default the test split, or all where that has fewer than 500 images and
    the model is an imported one."""
    held_out: int | None = None
    """How many are kept from the defense, to measure accuracy on and to audit by; default half."""
    methods: str = ""
    """Of the audit, with commas between; default all that can."""
    seed: int = 0
    """Draws the parts, and the methods' random numbers."""
    report: bool = True
    """Write report.html, one file for people."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    source = Path(first("purify", argv))
    defense, rest = chosen("defense", argv[1:])
    defense = defense or "auto"
    options = parse("purify", (argv[0],), rest, Flags, defense=defense)
    imported = import_options(options)
    from bdjax.pipelines import purification
    from bdjax.reports.purification import summary

    with ready(options) as context:
        result = purification.purify(
            source, options.out, defense, options.defense, clean=options.clean, imported=imported,
            images=options.images, held_out=options.held_out, seed=options.seed,
            methods=parse_names(options.methods), report=options.report,
            command=shlex.join(["bdjax", "purify", *argv]), context=context, say=say,
        )  # fmt: skip
    say(summary(result, options.out))
    if options.json:
        say(json.dumps(result))
