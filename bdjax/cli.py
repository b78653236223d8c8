"""The command line. Help and lists import no jax; a command imports what it needs when it runs.

Method names come first (`bdjax run ATTACK DEFENSE`), because they decide which flags there are: the fields
of the methods' own Config classes, as `--attack.FIELD` and `--defense.FIELD`.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from bdjax import __version__, registry
from bdjax import options as options_
from bdjax.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Run one command; exits with 2 and a message for what the user can mend, 1 for failed cells of a sweep."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        _say(_help())
        return
    if argv[0] == "--version":
        _say(f"bdjax {__version__}")
        return
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"unknown command {argv[0]!r}. Known: {', '.join(COMMANDS)}; see bdjax --help.")
        COMMANDS[argv[0]][0](argv[1:])
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:  # `bdjax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _fail(f"{error.strerror}: {error.filename or 'the output'}. Choose another directory with --out.")
    except KeyboardInterrupt:
        sys.exit(130)


def _run(argv: list[str]) -> None:
    (attack, defense), rest = _names(argv, "run", ("attacks", "defenses"))
    options = _parse(
        "run", (attack, defense), rest, options_.Plant, attack=attack, defense=defense, fit=True, split=True
    )
    from bdjax import run
    from bdjax.experiment import Experiment

    experiment = Experiment(
        attack, defense, options.dataset, options.model, options.seed, options.attack, options.defense,
        options.fit, options.split,
    )  # fmt: skip
    with _ready(options) as context:
        if options.force:
            _remove_run(options.out or run.directory_of(experiment, options.root))
        result, directory = run.run(experiment, options.root, options.out, context)
    _finish(result, directory, options.json)


def _train(argv: list[str]) -> None:
    (attack,), rest = _names(argv, "train", ("attacks",))
    options = _parse("train", (attack,), rest, options_.Plant, attack=attack, fit=True)
    from bdjax import checkpoint, run, victim
    from bdjax.experiment import Experiment

    experiment = Experiment(attack, None, options.dataset, options.model, options.seed, options.attack, fit=options.fit)
    with _ready(options) as context:
        directory = options.out or run.victim_directory_of(experiment, options.root)
        if options.force:
            _remove_run(directory)
        context.store = None if options.out else directory.parent
        victim.train(experiment, directory, context)
    manifest = checkpoint.read_manifest(directory)
    summary = {"directory": str(directory), **{k: manifest[k] for k in ("hash", "model", "seed", "seconds", "attack")}}
    _say(f"victim: {directory}\nnext:   bdjax evaluate {directory}\n        bdjax defend {directory} ibau")
    if options.json:
        _say(json.dumps(summary))


def _defend(argv: list[str]) -> None:
    first = _first("defend", argv, f"defenses: {', '.join(registry.names('defenses'))}")
    victim, (defense,), rest = Path(first), *_names(argv[1:], "defend", ("defenses",))
    options = _parse("defend", (str(victim), defense), rest, options_.Defend, defense=defense, split=True)
    from bdjax import run

    with _ready(options) as context:
        directory = options.out or run.defense_directory_of(
            victim, defense, options.defense, options.split, options.seed, options.root
        )
        if options.force:
            _remove_run(directory)
        result = run.defend(
            victim, defense, options.defense, directory,
            split=options.split, seed=options.seed, dataset=options.dataset, context=context,
        )  # fmt: skip
    _finish(result, directory, options.json)


def _evaluate(argv: list[str]) -> None:
    first = _first("evaluate", argv)
    options = _parse("evaluate", (first,), argv[1:], options_.Evaluate)
    from bdjax import run

    with _ready(options):
        found = run.evaluate(Path(first), options.data)
    for name, value in found.items():
        _say(f"{name:16s} {value:.4f}" if isinstance(value, float) else f"{name:16s} {value}")
    if options.json:
        _say(json.dumps(found))


def _solvers(argv: list[str]) -> None:
    first = _first("solvers", argv)
    options = _parse("solvers", (first,), argv[1:], options_.Solvers, defense="ibau", split=True)
    from bdjax import checkpoint, compare
    from bdjax.report import solvers

    out = options.out or Path("runs") / f"solvers-{checkpoint.read_manifest(Path(first))['hash'][:16]}"
    if (out / "solvers.json").exists() and not options.force:
        raise InputError(f"{out} holds a comparison already. Choose another --out, or --force to replace it.")
    chosen = tuple(options.solvers.split(",")) if options.solvers else compare.DEFAULT
    iterations = options_.whole_numbers("--iterations", options.iterations, "5,20")
    with _ready(options) as context:
        result = compare.compare(
            Path(first), solvers=chosen, iterations=iterations, config=options.defense,
            split=options.split, seed=options.seed, dataset=options.dataset, rounds=None if options.rounds else (),
            test_size=options.test_size, repeats=options.repeats, context=context,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / "solvers.json", json.dumps(result, indent=1) + "\n")
    _say(solvers.table(result))
    _say(f"picture: {solvers.draw(result, out / 'solvers.png')}\nresult:  {out / 'solvers.json'}")
    if options.json:
        _say(json.dumps(result))


def _gallery(argv: list[str]) -> None:
    options = _parse("gallery", (), argv, options_.Gallery)
    _check_picture(options.out)
    images = options_.whole_numbers("--image", options.image, "0,1,2") if options.image else None
    from bdjax import gallery
    from bdjax.report import gallery as report

    with _ready(options) as context:
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
    _say(report.table(result))
    _say(f"picture: {report.draw(result, pictures, options.out)}")
    if options.json:
        _say(json.dumps(result))


def _inspect(argv: list[str]) -> None:
    options = _parse("inspect", (), argv, options_.Inspect)
    from bdjax import inspection
    from bdjax.report import inspection as report

    report.check_directory(options.out)
    with _ready(options) as context:
        models = options.victim, options.purified, options.clean
        chosen = {"count": options.count, "seed": options.seed, "share": options.share}
        result = inspection.inspect(*models, options.dataset, **chosen, tick=context.tick)
    _say(report.write(result, options.out))
    if options.json:
        _say(json.dumps(result))


def _list(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        _usage("list", argv)
    if argv and argv[0] not in registry.KINDS:
        raise InputError(f"nothing is listed under {argv[0]!r}. Choose from {', '.join(registry.KINDS)}.")
    for kind in argv[:1] or registry.KINDS:
        if not argv:
            _say(f"{kind}:")
        for name in registry.names(kind):
            _say(f"  {name:18s} {registry.summary(kind, name)}")


def _sweep(argv: list[str]) -> None:
    first = _first("sweep", argv)
    options = _parse("sweep", (first,), argv[1:], options_.Sweep)
    from bdjax import sweep
    from bdjax.report.progress import bar

    with bar() as tick:
        failed = sweep.sweep(
            Path(first), options.out, seeds=options.seeds, shard=options.shard, workers=options.workers,
            devices=options.devices, tick=tick, say=_say,
        )  # fmt: skip
    sys.exit(1 if failed else 0)


def _cell(argv: list[str]) -> None:
    """One cell of a sweep in a process of its own (what `sweep` starts; not for people)."""
    from bdjax import sweep

    file, index, seed, out, devices = argv
    _prepare_jax()
    sweep.run_cell(Path(file), int(index), int(seed), Path(out), int(devices))


def _report(argv: list[str]) -> None:
    first = _first("report", argv)
    options = _parse("report", (first,), argv[1:], options_.Report)
    from bdjax.report import table

    form: Literal["text", "csv", "markdown"] = "csv" if options.csv else "markdown" if options.markdown else "text"
    _say(table.report(Path(first), form, options.papers))


def _demo(argv: list[str]) -> None:
    options = _parse("demo", (), argv, options_.Demo)
    from bdjax import run
    from bdjax.experiment import demo

    with _ready(options) as context:
        _remove_run(options.out)
        result, directory = run.run(demo(options.seed), Path("runs"), options.out, context)
    _finish(result, directory, options.json)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str, str]] = {
    "demo": (_demo, "[--seed S] [--out DIR]", "the main job on handwritten digits, with a table and a picture"),
    "run": (
        _run,
        "ATTACK DEFENSE [--dataset D] [--model M] [--seed S] [--attack.FIELD ..] [--defense.FIELD ..] [--fit.FIELD ..]"
        " [--split.FIELD ..] [--out DIR]",
        "plant ATTACK, checkpoint the victim, clean it with DEFENSE, measure before and after",
    ),
    "train": (
        _train,
        "ATTACK [--dataset D] [--model M] [--seed S] [--attack.FIELD ..] [--fit.FIELD ..] [--out DIR]",
        "plant ATTACK and write a victim directory",
    ),
    "defend": (
        _defend,
        "VICTIM_DIR DEFENSE [--defense.FIELD ..] [--split.FIELD ..] [--seed S] [--out DIR]",
        "clean the model in VICTIM_DIR, measure before and after",
    ),
    "evaluate": (_evaluate, "DIR [--data D]", "accuracy and attack success rate of a model directory"),
    "solvers": (
        _solvers,
        "VICTIM_DIR [--solvers a,b:RIDGE] [--iterations 5,20] [--no-rounds] [--defense.FIELD ..] [--split.FIELD ..]"
        " [--out DIR]",
        "compare hypergradient solvers on VICTIM_DIR: accuracy, cost, one round of I-BAU with each",
    ),
    "sweep": (
        _sweep,
        "experiments/FILE.py [--seeds 0,1,2] [--shard i/n] [--workers k] [--out DIR]",
        "run what is not finished yet of a grid",
    ),
    "report": (_report, "DIR [--csv | --markdown]", "mean, std and n of the results below DIR, beside the papers'"),
    "gallery": (
        _gallery,
        "[ATTACK | VICTIM_DIR ...] [--dataset D] [--seed S] [--image I,J] --out FILE.png",
        "triggers side by side: a picture and how far each takes an image from the clean one",
    ),
    "inspect": (_inspect, "VICTIM_DIR PURIFIED_DIR [CLEAN_DIR] --out DIR", "what a defense did inside a victim"),
    "list": (_list, "[attacks|defenses|models|datasets]", "what there is"),
    "_cell": (_cell, "", ""),
}


def _help() -> str:
    shown = {name: entry for name, entry in COMMANDS.items() if not name.startswith("_")}
    lines = ["usage: bdjax COMMAND ...", "", "Plant backdoors in neural networks, remove them, and measure both.", ""]
    lines += [f"  {name:10s} {entry[2]}" for name, entry in shown.items()]
    lines += ["", *(f"bdjax {name} {entry[1]}" for name, entry in shown.items())]
    lines += ["", "All flags of a method: bdjax run ATTACK DEFENSE --help"]
    return "\n".join(lines)


def _usage(command: str, argv: list[str], more: str = "") -> None:
    """Print a command's usage: as help on request, as an error when its arguments are missing."""
    text = f"usage: bdjax {command} {COMMANDS[command][1]}" + (f"\n{more}" if more else "")
    if argv and argv[0] in ("-h", "--help"):
        _say(f"{text}\n\n{COMMANDS[command][2]}")
        sys.exit(0)
    raise InputError(f"{command} needs more arguments.\n{text}")


def _first(command: str, argv: list[str], more: str = "") -> str:
    """The argument that a command begins with; its usage when there is none."""
    if not argv or argv[0].startswith("-"):
        _usage(command, argv, more)
    return argv[0]


def _names(argv: list[str], command: str, kinds: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The method names at the head of `argv`, each checked, and the rest."""
    names = argv[: len(kinds)]
    if len(names) < len(kinds) or any(name.startswith("-") for name in names):
        _usage(command, argv, "\n".join(f"{kind}: {', '.join(registry.names(kind))}" for kind in kinds))
    for kind, name in zip(kinds, names, strict=True):
        registry.check(kind, name)
    return names, argv[len(kinds) :]


def _parse(command: str, names: tuple[str, ...], rest: list[str], base: type, **parts: Any) -> Any:
    """The flags in `rest` as an instance of `base`, with the Configs of the methods in `parts` added to it."""
    extra: list[tuple[str, type, Any]] = []
    if parts:
        from bdjax.experiment import FitConfig, SplitConfig, config_of

        kinds = {"attack": "attacks", "defense": "defenses"}
        for name, value in parts.items():
            config = config_of(kinds[name], value) if name in kinds else {"fit": FitConfig, "split": SplitConfig}[name]
            extra.append((name, config, dataclasses.field(default_factory=config)))
    options = dataclasses.make_dataclass(base.__name__, extra, bases=(base,))
    options.__doc__ = COMMANDS[command][2]
    return tyro.cli(options, prog=" ".join(("bdjax", command, *names)), args=rest)


@contextlib.contextmanager
def _ready(options: Any) -> Iterator[Any]:
    """Everything a computing command needs around it: the compilation cache, a progress bar, a Context."""
    _prepare_jax()
    from bdjax.report.progress import bar
    from bdjax.victim import Context

    with bar() as tick:
        yield Context(getattr(options, "devices", 0), tick)


def _prepare_jax() -> None:
    """Keep compiled programs from run to run, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdjax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _finish(result: dict[str, Any], directory: Path, as_json: bool) -> None:
    import numpy as np

    from bdjax.report import figure, table

    _say(table.one(result))
    picture = directory / "figure.png"
    if not picture.exists():
        with np.load(directory / "arrays.npz", allow_pickle=False) as arrays:
            figure.draw(result, dict(arrays), picture)
    _say(f"picture: {picture}\nresult:  {directory / 'result.json'}\nmodel:   {directory / 'purified'}")
    if as_json:
        _say(json.dumps(result))


def _remove_run(directory: Path) -> None:
    """Remove a run or model directory of ours; anything else is refused."""
    if not directory.exists():
        return
    ours = any((directory / name).exists() for name in ("config.json", "result.json", "manifest.json", "victim"))
    if not ours and any(directory.iterdir()):
        raise InputError(f"{directory} is not a bdjax run; it is left alone. Choose another --out.")
    shutil.rmtree(directory)


def _check_picture(path: Path) -> None:
    """Raise InputError, before any computing, when a PNG cannot be written there."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path} does not end in .png. Give the name of a PNG file.")
    if path.is_dir():
        raise InputError(f"--out {path} is a directory. Give the name of a PNG file.")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no directory {path.parent}. Make it, or choose another --out.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written (permission denied). Choose another --out.")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fail(message: str) -> None:
    sys.stderr.write(f"bdjax: {message}\n")
    sys.exit(2)
