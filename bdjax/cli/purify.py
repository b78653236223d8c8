"""`bdjax purify`: turn a weight file into a cleaned weight file and a report, in one command."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._devices import run_context
from bdjax.cli._import_options import import_options
from bdjax.cli._methods import pop_method
from bdjax.cli._options import DeviceFlags, WeightFileFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.text import parse_names

ORDER = 44
USAGE = "FILE|DIR [--model M] --clean-data D [--defense DEFENSE --defense.FIELD ..] [--input-mean ..] --out DIR"
SUMMARY = "import, audit, clean, compare and export a model in one command, with an HTML report"


@dataclass(kw_only=True)
class Flags(WeightFileFlags, DeviceFlags):
    """Flags of `bdjax purify`; those of `bdjax import` apply to a FILE."""

    out: Path
    """Directory of all results: model, purified, purified.pt (.pth, .safetensors), audit.json, pictures, report.html,
    result.json. An unfinished run of the same call is continued; other content is an error and is not changed."""
    clean_data: str | None = None
    """Data set of labelled clean images: digits, npz:PATH, folder:PATH or tfds:NAME; a hundred images suffice. Required
    for a FILE and an imported model; default: the data set that the model in DIR was trained on."""
    images: Literal["test", "all"] | None = None
    """Images of that data set to use: its test split, or all; default: the test split, but all for an imported model if
    the test split has fewer than 500 images."""
    held_out: int | None = None
    """Number of these images that the defense does not see, for measuring accuracy and for the audit; default: half."""
    methods: str = ""
    """Comma-separated names of the audit's detectors; default: additive and patch (see `bdjax audit --help`)."""
    seed: int = 0
    """Seed of the split of the images and of the methods' random numbers."""
    report: bool = True
    """Write report.html, a single self-contained file."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    source = Path(first_argument("purify", argv))
    defense, rest = pop_method("defense", argv[1:])
    defense = defense or "auto"
    options = parse_flags("purify", (argv[0],), rest, Flags, defense=defense)
    imported = import_options(options)
    from bdjax.pipelines.purification import purify
    from bdjax.pipelines.purify_request import PurifyRequest
    from bdjax.reports import reporter
    from bdjax.reports.purification import summary

    request = PurifyRequest(
        source, defense, options.defense, options.clean_data, imported, options.images, options.held_out, options.seed,
        parse_names(options.methods), command=shlex.join(["bdjax", "purify", *argv]),
    )  # fmt: skip
    with run_context(options) as context:
        result = purify(request, options.out, reporter, page=options.report, context=context, say=say)
    say(summary(result, options.out))
    if options.json:
        say(json.dumps(result))
