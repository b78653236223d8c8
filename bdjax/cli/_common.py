"""What commands share: reading their arguments, what computing needs around it, and what they say at the end."""

import contextlib
import dataclasses
import importlib
import json
import keyword
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from bdjax import registry
from bdjax.cli._options import Cluster, Foreign
from bdjax.errors import InputError
from bdjax.text import parse_floats, parse_integers, parse_names, visible


def command(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"bdjax.cli.{name}{'_' if keyword.iskeyword(name) else ''}")


def usage(name: str, argv: list[str], more: str = "") -> None:
    """Print a command's usage: as help on request, as an error when its arguments are missing."""
    text = f"usage: bdjax {name} {command(name).USAGE}" + (f"\n{more}" if more else "")
    if argv and argv[0] in ("-h", "--help"):
        say(f"{text}\n\n{command(name).SUMMARY}")
        sys.exit(0)
    raise InputError(f"{name} needs more arguments.\n{text}")


def first(name: str, argv: list[str], more: str = "") -> str:
    """The argument that a command begins with; its usage when there is none.

    Where only help is asked for, the argument's name is put before the flags, which `parse` then lists.
    """
    words = command(name).USAGE.split()
    if {"-h", "--help"} & set(argv) and argv[0].startswith("-") and words[1][0] in "[-":
        say(f"usage: bdjax {name} {command(name).USAGE}\n")  # what follows lists all flags, and needs no argument
        argv.insert(0, words[0])
    if not argv or argv[0].startswith("-"):
        usage(name, argv, more)
    return argv[0]


def chosen(part: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The method that `--PART NAME` names (attack or defense), checked, and the other arguments: it decides which flags
    there are."""
    flag, kind = f"--{part}", f"{part}s"
    if flag not in argv:
        return None, argv
    place = argv.index(flag)
    if place + 1 == len(argv):
        raise InputError(f"{flag} needs the name of one: {', '.join(registry.names(kind))}.")
    registry.check(kind, argv[place + 1])
    return argv[place + 1], [*argv[:place], *argv[place + 2 :]]


def methods(argv: list[str], name: str, kinds: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The method names at the head of `argv`, each checked, and the rest."""
    found = argv[: len(kinds)]
    if len(found) < len(kinds) or any(method.startswith("-") for method in found):
        usage(name, argv, "\n".join(f"{kind}: {', '.join(registry.names(kind))}" for kind in kinds))
    for kind, method in zip(kinds, found, strict=True):
        registry.check(kind, method)
    return found, argv[len(kinds) :]


def parse(name: str, names: tuple[str, ...], rest: list[str], base: type, **parts: Any) -> Any:
    """The flags in `rest` as an instance of `base`, with the Configs of the methods in `parts` added to it."""
    extra: list[tuple[str, type, Any]] = []
    if parts:
        from bdjax.config import FitConfig, SplitConfig, config_of

        kinds = {"attack": "attacks", "defense": "defenses"}
        for part, value in parts.items():
            config = config_of(kinds[part], value) if part in kinds else {"fit": FitConfig, "split": SplitConfig}[part]
            extra.append((part, config, dataclasses.field(default_factory=config)))
    options = dataclasses.make_dataclass(base.__name__, extra, bases=(base,))
    options.__doc__ = command(name).SUMMARY
    found: Any = tyro.cli(options, prog=" ".join(("bdjax", name, *names)), args=rest)
    for file in parse_names(getattr(found, "code", "")):
        registry.load_file(Path(file))
    return found


class _Told(logging.Handler):
    """What the library logs, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        sys.stderr.write(f"bdjax: {visible(record.getMessage())}\n")


def tell() -> None:
    """Show on stderr what the library logs: which file of code is executed."""
    log = logging.getLogger("bdjax")
    if not any(isinstance(handler, _Told) for handler in log.handlers):
        log.addHandler(_Told())
        log.setLevel(logging.INFO)
        log.propagate = False


@contextlib.contextmanager
def ready(options: Any) -> Iterator[Any]:
    """Everything a computing command needs around it: the compilation cache, a progress bar, a Context."""
    _configure()
    join(options)
    _check_devices()
    from bdjax.pipelines.victim import Context
    from bdjax.reports.progress import bar

    with bar() as tick, traced(getattr(options, "profile", None)):
        yield Context(getattr(options, "devices", 0), tick, getattr(options, "estimate", True), say=say)


def prepare_jax() -> None:
    """What computing needs of jax: a device, and compiled programs that are kept. Raises InputError without one."""
    _configure()
    _check_devices()


def _check_devices() -> None:
    """Raise InputError when jax finds no device of the kind that JAX_PLATFORMS asks for."""
    import jax

    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where a CUDA build of jaxlib is missing
        raise InputError(no_device(error)) from None


def no_device(error: BaseException) -> str:
    """Why jax has no device, and the remedy, in a line."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    said = (str(error).splitlines() or [""])[0].partition(" (set JAX_PLATFORMS")[0] or type(error).__name__
    what = f"JAX_PLATFORMS={asked} asks for a device that" if asked else "there is no device that"
    return (
        f"{what} jax cannot use ({said[:300]}). Set JAX_PLATFORMS=cpu or leave it empty; for an accelerator install "
        "its jax: pip install 'bdjax[cuda13]', 'bdjax[cuda12]' or 'bdjax[tpu]', and a driver that fits."
    )


def _configure() -> None:
    """Keep compiled programs from run to run, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdjax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def traced(directory: Path | None) -> Iterator[None]:
    """Write a profile of the block into `directory`, if one is given."""
    if directory is None:
        yield
        return
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--profile {directory} is a file. Give the name of a directory.")
    import jax

    how = jax.profiler.ProfileOptions()
    how.python_tracer_level = 0  # every call of Python would drown the rest
    with jax.profiler.trace(directory, profiler_options=how):
        yield


def join(options: Any) -> None:
    """Make this process one of those that train together, where the flags of `bdjax.cli._options.Cluster` say so."""
    if not isinstance(options, Cluster):
        return
    coordinator, processes, process, slurm = options.coordinator, options.processes, options.process, options.slurm
    if not coordinator and not slurm:
        if processes or process >= 0:
            raise InputError("--processes and --process need --coordinator HOST:PORT, the first process's.")
        return
    if slurm and coordinator:
        raise InputError("--slurm and --coordinator say the same thing. Give one of them.")
    if coordinator and not (":" in coordinator and processes >= 1 and 0 <= process < processes):
        raise InputError(
            f"--coordinator {coordinator} needs the form HOST:PORT, --processes of at least 1 and --process from 0 to "
            f"one less; got --processes {processes} --process {process}."
        )
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if slurm:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes did not find together: {str(error).splitlines()[0]}") from None


def import_options(options: Foreign) -> dict[str, Any]:
    """Flags on a weight file as `interop.import_model` takes them, checked."""
    if options.classes is not None and options.classes < 2:
        raise InputError(f"--classes must be at least 2, got {options.classes}.")
    size = parse_integers("--size", options.size, "32 or 32,48") if options.size else None
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise InputError(f"--size must be a side in pixels, or height,width; got {options.size!r}.")
    mean = parse_floats("--input-mean", options.input_mean, "0.4914,0.4822,0.4465")
    std = parse_floats("--input-std", options.input_std, "0.247,0.243,0.261")
    prepare_jax()
    from bdjax.models import Input

    given = Input(mean, std, options.channels, options.layout, options.resize)
    return {
        "model": options.model,
        "classes": options.classes,
        "size": None if size is None else (size[0], size[-1]),
        "input": None if given == Input() else given,
        "key": options.key,
        **({"ignore": tuple(parse_names(options.ignore))} if options.ignore else {}),
        "network": _network(options) or None,
    }


def _network(options: Foreign) -> dict[str, Any]:
    """The options of a network that flags name. Raises InputError for what is no pair NAME=VALUE."""
    found: dict[str, Any] = {"stem": options.stem} if options.stem else {}
    if options.pool:
        found["pool"] = 0 if options.pool == "global" else _value(options.pool)
    if options.transform_input:
        found["transform_input"] = True
    for pair in parse_names(options.network):
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"--network must be NAME=VALUE pairs with commas between, such as heads=6; got {pair!r}.")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), int(text) if text.isdecimal() and text.isascii() else text)


def remarks(result: dict[str, Any]) -> None:
    """What a result says of its data, and its warnings, a line each."""
    for line in result.get("data") or ():
        say(f"data:    {line}")
    for warning in result.get("warnings") or ():
        say(f"warning: {warning}")


def finish(result: dict[str, Any], directory: Path, as_json: bool) -> None:
    """The table, the picture and the places of a finished run."""
    from bdjax.io import checkpoint, records
    from bdjax.reports import figure, table

    if not checkpoint.is_main_process():
        return
    with records.reading_record(directory / "result.json"):
        say(table.one(result))
        remarks(result)
    picture = directory / "figure.png"
    if not picture.exists():
        arrays = checkpoint.read_arrays(directory, "arrays")
        with records.reading_record(directory / "arrays.npz"):
            figure.draw(result, arrays, picture)
    say(f"picture: {picture}\nresult:  {directory / 'result.json'}\nmodel:   {directory / 'purified'}")
    if as_json:
        say(json.dumps(result))


def remove_run(directory: Path) -> None:
    """Remove a run or model directory of ours; anything else is refused."""
    from bdjax.io import checkpoint

    if checkpoint.is_main_process():
        _remove(directory)
    checkpoint.barrier("what was there is removed")


def _remove(directory: Path) -> None:
    if not directory.exists():
        return
    if directory.is_symlink() or not directory.is_dir():
        raise InputError(f"{directory} is a file or a symbolic link, no directory of bdjax's. Choose another --out.")
    ours = any((directory / name).exists() for name in ("config.json", "result.json", "manifest.json", "victim"))
    if not ours and any(directory.iterdir()):
        raise InputError(f"{directory} is not a bdjax run; it is left alone. Choose another --out.")
    shutil.rmtree(directory)


def check_file(path: Path, suffix: str | tuple[str, ...], what: str) -> None:
    """Raise InputError, before any computing, when a file of that suffix (or one of these) cannot be written there."""
    if not path.name.lower().endswith(suffix):
        ends = suffix if isinstance(suffix, str) else " or ".join(suffix)
        raise InputError(f"--out {path} does not end in {ends}. Give the name of a {what} file.")
    if path.is_dir():
        raise InputError(f"--out {path} is a directory. Give the name of a {what} file.")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no directory {path.parent}. Make it, or choose another --out.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written (permission denied). Choose another --out.")


def say(text: str) -> None:
    """A line on stdout, at once; what would move the cursor or turn text around is escaped."""
    sys.stdout.write(visible(text, lines=True) + "\n")
    sys.stdout.flush()


def fail(message: str) -> None:
    """A line on stderr, and exit code 2."""
    sys.stderr.write(f"bdjax: {visible(message, lines=True)}\n")
    sys.exit(2)
