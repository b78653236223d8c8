"""`bdjax sweep`: run a grid of experiments."""

import dataclasses
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bdjax.cli._options import DeviceFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.text import parse_names

ORDER = 70
USAGE = "experiments/FILE.py [--OPTION ..] [--seeds 0,1,2] [--backend local|slurm|ray] [--workers K] [--out DIR]"
SUMMARY = "run the unfinished cells of a grid of experiments"


@dataclass
class Flags(DeviceFlags):
    """Flags of `bdjax sweep`."""

    out: Path | None = None
    """Directory of the results; default: runs/PAPER/TABLE, the path of the file below experiments/."""
    seeds: str = ""
    """Comma-separated seeds, such as 0,1,2; default: those of the file."""
    shard: str = "0/1"
    """I/N: run only part I, from 0, of N parts of the grid; cells that share a victim are in the same part."""
    workers: int = 0
    """Number of cells at a time; default (0): one on this machine, as many as there is room for on a cluster."""
    backend: Literal["local", "slurm", "ray"] = "local"
    """Where the cells are carried out: local: processes of this machine; slurm: job arrays, submitted here; ray: tasks
    of a Ray cluster (pip install 'bdjax[ray]'). All machines must see the same files."""
    gpus_per_cell: float = 0.0
    """GPUs of a cell on a cluster; with ray a fraction shares one."""
    cpus_per_cell: int = 1
    """CPU cores of a cell on a cluster."""
    slurm_options: str = ""
    """Further options of sbatch, with an equals sign: --slurm-options="--partition=gpu --time=4:00:00"."""
    ray_address: str = ""
    """Address of the Ray cluster, HOST:PORT; default: the one that runs on this machine, else Ray is started here."""
    print: bool = False
    """Print the scripts or commands of the unfinished cells and run nothing."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    file = Path(first_argument("sweep", argv))
    from bdjax.pipelines import backends, sweep
    from bdjax.pipelines.experiment_options import options_class
    from bdjax.reports.progress import bar

    kind = options_class(file)
    flags = Flags if kind is None else dataclasses.make_dataclass("Flags", _fields_of(kind), bases=(Flags,))
    options = parse_flags("sweep", (argv[0],), argv[1:], flags)
    chosen = None
    if kind is not None:
        chosen = kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})
    resources = backends.Resources(
        options.workers, options.gpus_per_cell, options.cpus_per_cell, options.slurm_options, options.ray_address
    )
    request = sweep.SweepRequest(
        file, options.out, chosen, options.seeds, options.shard, options.devices, options.backend, resources
    )
    if options.print:
        say(sweep.describe(request))
        return
    with bar() as tick:
        failed = sweep.sweep(request, tick=tick, say=say)
    sys.exit(1 if failed else 0)


def _fields_of(kind: type) -> list[tuple[str, Any, Any]]:
    """The options of a file of experiments as fields of the command's flags, with their docstrings as help."""
    import docstring_parser

    documented: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        params = docstring_parser.parse_from_object(base).params
        documented |= {param.arg_name: " ".join((param.description or "").split()) for param in params}
    hints = typing.get_type_hints(kind)
    return [
        (
            field.name,
            _comma_separated(hints[field.name]),
            dataclasses.field(default=field.default, metadata={"help": documented.get(field.name, "")}),
        )
        for field in dataclasses.fields(kind)
    ]


def _comma_separated(hint: Any) -> Any:
    """A tuple of texts or numbers as a flag with one value such as 0,1,2; other types unchanged."""
    import tyro

    if typing.get_origin(hint) is not tuple:
        return hint
    kind = typing.get_args(hint)[0]
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()},..",
        instance_from_str=lambda words: tuple(kind(part) for part in parse_names(words[0])),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )
    return typing.Annotated[hint, spec]
