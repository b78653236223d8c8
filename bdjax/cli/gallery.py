"""`bdjax gallery`: a picture of triggers and a table."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdjax.cli._common import check_file, parse, ready, say
from bdjax.cli._options import Common
from bdjax.text import parse_integers

ORDER = 90
USAGE = "[ATTACK | VICTIM_DIR ...] [--dataset D] [--seed S] [--image I,J] --out FILE.png"
SUMMARY = "triggers side by side: a picture and how far each takes an image from the clean one"


@dataclass(kw_only=True)
class Flags(Common):
    """Flags of `bdjax gallery`."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ATTACK|VICTIM_DIR ...]")] = ()
    """Attacks (with their default Config) and victim directories; none: all attacks whose trigger needs no training."""
    out: Path
    """PNG file to write; one that stands there is replaced."""
    dataset: str | None = None
    """digits, npz:PATH, folder:PATH or tfds:NAME; default that of the victims given, else digits."""
    seed: int = 0
    """Decides which images are measured and what the triggers draw."""
    image: str = ""
    """Comma-separated positions in the test split of the images to show, at most 6; default 3 of the measured ones."""
    count: int = 100
    """Images of the test split behind the numbers; all, if there are fewer."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    options = parse("gallery", (), argv, Flags)
    check_file(options.out, ".png", "PNG")
    images = parse_integers("--image", options.image, "0,1,2") if options.image else None
    from bdjax.pipelines import gallery
    from bdjax.reports import gallery as report

    with ready(options) as context:
        result, pictures = gallery.gallery(
            options.sources,
            dataset=options.dataset,
            seed=options.seed,
            images=images,
            count=options.count,
            tick=context.tick,
        )
    for line in report.left_out(result):
        sys.stderr.write(f"bdjax: {line}\n")
    say(report.table(result))
    say(f"picture: {report.draw(result, pictures, options.out)}")
    if options.json:
        say(json.dumps(result))
