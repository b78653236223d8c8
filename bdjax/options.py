"""The flags of the commands, as dataclasses that tyro turns into a command line, and how lists in them are read.

Imports no jax.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdjax.errors import InputError


@dataclass
class Common:
    """What every command takes."""

    json: bool = False
    """Make the last line of stdout the result, as one JSON object."""


@dataclass
class Device(Common):
    """What a computing command takes."""

    devices: int = 0
    """Local devices to compute on; 0: all of them."""


@dataclass
class Place(Device):
    """Where a command writes."""

    root: Path = Path("runs")
    """Results go to ROOT/HASH and victims to ROOT/victims/HASH, by the content of their configuration."""
    out: Path | None = None
    """Put this one there instead."""
    force: bool = False
    """Remove an earlier bdjax run that stands there, and run again."""


@dataclass
class Plant(Place):
    """What is attacked."""

    dataset: str = "digits"
    """digits, npz:PATH, folder:PATH or tfds:NAME."""
    model: str = "cnn"
    """Name of the classifier; see `bdjax list models`."""
    seed: int = 0
    """Everything random follows from it."""


@dataclass
class Defend(Place):
    """Flags of `bdjax defend`."""

    dataset: str | None = None
    """Where the victim's data set lies now, if it has moved."""
    seed: int | None = None
    """Of the defense; default the victim's."""


@dataclass
class Evaluate(Common):
    """Flags of `bdjax evaluate`."""

    data: str | None = None
    """Another data set of the model's shape: digits, npz:PATH, folder:PATH or tfds:NAME."""


@dataclass
class Sweep(Device):
    """Flags of `bdjax sweep`."""

    out: Path | None = None
    """Directory of the results; default runs/FILE's name."""
    seeds: str = ""
    """Comma-separated, such as 0,1,2; default the seeds of the file."""
    shard: str = "0/1"
    """i/n: do only the i-th of n parts of the grid (cells of one victim stay together)."""
    workers: int = 1
    """Processes at a time on this machine."""


@dataclass
class Report:
    """Flags of `bdjax report`."""

    csv: bool = False
    """Comma-separated values."""
    markdown: bool = False
    """A Markdown table (the default is plain text)."""
    papers: Path | None = None
    """Folder of the papers' CSV tables; default experiments/papers."""


@dataclass
class Demo(Device):
    """Flags of `bdjax demo`."""

    out: Path = Path("runs/demo")
    """Directory of the run; an earlier demo there is replaced."""
    seed: int = 0
    """Everything random follows from it."""


@dataclass
class Solvers(Device):
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


@dataclass(kw_only=True)
class Gallery(Common):
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


@dataclass(kw_only=True)
class Inspect(Common):
    """Flags of `bdjax inspect`."""

    victim: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VICTIM_DIR")]
    """The model with the backdoor."""
    purified: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PURIFIED_DIR")]
    """What a defense made of it."""
    clean: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CLEAN_DIR]")] = None
    """From `bdjax train clean` with the victim's flags and another seed; without it there is no BEC."""
    out: Path
    """Directory of inspection.json and inspection.png; those that stand there are replaced."""
    dataset: str | None = None
    """Where the victim's data set lies now, if it has moved."""
    count: int | None = None
    """Held-out images to look inside the models with; default 500, or all if there are fewer."""
    seed: int = 0
    """Decides which these are, and the t-SNE."""
    share: float = 1.0
    """Of the layers, counted from the last, that the means are over, in (0, 1]; BI-BAU takes 0.5."""


def whole_numbers(flag: str, text: str, example: str) -> tuple[int, ...]:
    """The numbers in "5,20". Raises InputError for anything else, with the flag and an example of what it takes."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{flag} must be whole numbers with commas between, such as {example}; got {text!r}."
        ) from None
