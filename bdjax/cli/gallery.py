"""`bdjax gallery`: a picture of triggers and a table of the changes that they make."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdjax.cli._devices import run_context
from bdjax.cli._options import CommonFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import parse_flags
from bdjax.cli._paths import check_output_file
from bdjax.text import parse_integers

ORDER = 90
USAGE = "[ATTACK | VICTIM_DIR ...] [--dataset D] [--seed S] [--image I,J] --out FILE.png"
SUMMARY = "draw triggers side by side, with a table of how much each changes an image"


@dataclass(kw_only=True)
class Flags(CommonFlags):
    """Flags of `bdjax gallery`."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ATTACK|VICTIM_DIR ...]")] = ()
    """Attacks (with their default Config) and victim directories; default: all attacks whose trigger needs no
    training."""
    out: Path
    """PNG file to write; an existing file is replaced."""
    dataset: str | None = None
    """Data set: digits, npz:PATH, folder:PATH or tfds:NAME; default: that of the victims, else digits."""
    seed: int = 0
    """Seed of the choice of images and of random triggers."""
    image: str = ""
    """Comma-separated indices in the test split of the images to draw, at most 6; default: 3 of the measured ones."""
    count: int = 100
    """Number of test images that the table is measured on; all if there are fewer."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    options = parse_flags("gallery", (), argv, Flags)
    check_output_file(options.out, ".png", "PNG")
    images = parse_integers("--image", options.image, "0,1,2") if options.image else None
    from bdjax.pipelines import gallery
    from bdjax.reports import gallery as report

    with run_context(options) as context:
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
