"""The flags that several commands take, as dataclasses for tyro, and how lists in flags are read. Imports no jax."""

from dataclasses import dataclass
from pathlib import Path

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
class Traced(Device):
    """What a command takes whose time is worth looking into."""

    profile: Path | None = None
    """Write a trace of what the devices do into that directory, for xprof or ui.perfetto.dev."""


@dataclass
class Cluster(Traced):
    """Several processes, on one machine or many, that train one model together: the same command in each."""

    coordinator: str = ""
    """HOST:PORT of the first process, which the others reach; needs --processes and --process."""
    processes: int = 0
    """How many there are."""
    process: int = -1
    """Which of them this is, from 0; the first one writes the results, into a directory that all can read."""
    slurm: bool = False
    """Take the three from Slurm: `srun bdjax ... --slurm`, one task a process."""


@dataclass
class Place(Cluster):
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


def whole_numbers(flag: str, text: str, example: str) -> tuple[int, ...]:
    """The numbers in "5,20". Raises InputError for anything else, with the flag and an example of what it takes."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{flag} must be whole numbers with commas between, such as {example}; got {text!r}."
        ) from None


def numbers(flag: str, text: str, example: str) -> tuple[float, ...]:
    """The numbers in "0.5,0.4", "" for none. Raises InputError for anything else, as :func:`whole_numbers`."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"{flag} must be numbers with commas between, such as {example}; got {text!r}.") from None
