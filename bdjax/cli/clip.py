"""`bdjax clip`: dual encoders of images and captions: train, attack, defend, re-activate, measure, import, export."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

from bdjax.cli._clip_flags import (
    AttackFlags,
    DefendFlags,
    EvaluateFlags,
    ExportFlags,
    ImportFlags,
    MemoryFlags,
    ReactivateFlags,
    TrainFlags,
)
from bdjax.cli._output import say
from bdjax.cli._parsing import stop_with_usage
from bdjax.errors import InputError

ORDER = 95
USAGE = "train|attack|defend|reactivate|evaluate|import|export|memory ... [--out DIR]"
SUMMARY = "train, attack, clean and measure dual encoders of images and captions (CLIP)"
_DETAILS = """
  clip train [--pairs captions:digits] [--size tiny] [--attack NAME --target CLASS] --out DIR
  clip attack DIR ATTACK --target CLASS --out DIR       fine-tune a clean dual encoder on poisoned pairs
  clip defend DIR DEFENSE --out DIR                     clean it, measure before and after
  clip reactivate DIR --out DIR                         retune a cleaned one with a few poisoned pairs
  clip evaluate DIR                                     zero-shot accuracy and attack success rate
  clip import FILE --out DIR                            weights of OpenAI, OpenCLIP or Hugging Face
  clip export DIR --out FILE                            safetensors, or .pt
  clip memory --size vit_b_32 --batch 64                what a step needs, by the compiler's estimate

All flags: bdjax clip SUBCOMMAND --help, with the names of the method where there is one."""


def main(argv: list[str]) -> None:
    """Run a subcommand with the arguments that follow `clip`."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train, "attack": _attack, "defend": _defend, "reactivate": _reactivate, "evaluate": _evaluate,
        "import": _import, "export": _export, "memory": _memory,
    }  # fmt: skip
    if argv[:1] in (["-h"], ["--help"]):
        say(f"usage: bdjax clip {USAGE}\n{_DETAILS}")
        return
    if not argv or argv[0].startswith("-"):
        stop_with_usage("clip", argv, _DETAILS)
    if argv[0] not in commands:
        raise InputError(f"clip has no subcommand {argv[0]!r}. Known: {', '.join(commands)}.")
    commands[argv[0]](argv[1:])


def _positional(argv: list[str], name: str, *placeholders: str) -> tuple[list[str], list[str]]:
    """Take the arguments before the first flag. Raises InputError when they are not as many as the placeholders."""
    count = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    if count != len(placeholders) and not {"-h", "--help"} & set(argv):
        given = " ".join(argv[:count]) or "none"
        raise InputError(f"usage: bdjax clip {name} {' '.join(placeholders)} ...; got {given}.")
    return [*argv[:count], *placeholders[count:]], argv[count:]


def _parse(name: str, argv: list[str], flags: type, **parts: type) -> Any:
    """Parse flags, and the fields --PART.FIELD of the parts."""
    import tyro

    fields = [(part, kind, field(default_factory=kind)) for part, kind in parts.items()]
    options = dataclasses.make_dataclass(flags.__name__, fields, bases=(flags,))
    options.__doc__ = flags.__doc__
    return tyro.cli(options, prog=f"bdjax clip {name}", args=argv)


def _pop(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take a flag and its value out of the arguments."""
    if flag not in argv:
        return None, argv
    index = argv.index(flag)
    if index + 1 >= len(argv):
        raise InputError(f"{flag} needs a value.")
    return argv[index + 1], argv[:index] + argv[index + 2 :]


def _train(argv: list[str]) -> None:
    attack, argv = _pop(argv, "--attack")
    from bdjax.engine.contrastive import PairFitConfig
    from bdjax.vision_language import methods

    parts: dict[str, type] = {"fit": PairFitConfig}
    if attack is not None:
        parts["attack"] = methods.load("attacks", attack).Config
    options = _parse("train", argv, TrainFlags, **parts)
    from bdjax import models
    from bdjax.vision_language.training import TrainRequest, train

    model = models.PRESETS[options.size]
    if options.context:
        model = dataclasses.replace(model, context=options.context)
    request = TrainRequest(
        options.pairs, model, options.templates, options.vocabulary, options.merges, options.too_long, attack,
        getattr(options, "attack", None) if attack else None, options.target, options.fit, options.seed,
    )  # fmt: skip
    with _progress(options) as callback:
        manifest = train(request, options.out, callback)
    _print_trained(options, manifest)


def _attack(argv: list[str]) -> None:
    (directory, attack), argv = _positional(argv, "attack", "DIR", "ATTACK")
    from bdjax.engine.contrastive import PairFitConfig
    from bdjax.vision_language import artifact, methods
    from bdjax.vision_language.training import TrainRequest, train

    options = _parse(
        "attack", argv, AttackFlags, fit=PairFitConfig, attack=methods.load("attacks", attack).Config
    )  # fmt: skip
    dual = artifact.open_dual(Path(directory))
    request = TrainRequest(
        options.pairs or str(dual.manifest.get("pairs") or ""), dual.encoder.config, options.templates, attack=attack,
        attack_config=options.attack, target=options.target, fit=options.fit, seed=options.seed, start=Path(directory),
    )  # fmt: skip
    with _progress(options) as callback:
        manifest = train(request, options.out, callback)
    _print_trained(options, manifest)


def _defend(argv: list[str]) -> None:
    (directory, defense), argv = _positional(argv, "defend", "DIR", "DEFENSE")
    from bdjax.vision_language import methods
    from bdjax.vision_language.defending import DefendRequest, EvaluationOptions, defend

    options = _parse("defend", argv, DefendFlags, defense=methods.load("defenses", defense).Config)
    evaluation = EvaluationOptions(options.test, options.templates, options.images)
    request = DefendRequest(
        Path(directory), defense, options.defense, options.pairs, options.size, options.seed, evaluation
    )
    with _progress(options) as callback:
        _print_change(options, defend(request, options.out, callback), "ASR")


def _reactivate(argv: list[str]) -> None:
    (directory,), argv = _positional(argv, "reactivate", "DIR")
    from bdjax.vision_language.defending import EvaluationOptions, RetuningConfig, reactivate

    options = _parse("reactivate", argv, ReactivateFlags, retuning=RetuningConfig)
    evaluation = EvaluationOptions(options.test, options.templates, options.images)
    with _progress(options) as callback:
        result = reactivate(Path(directory), options.retuning, options.out, options.seed, evaluation, callback)
    _print_change(options, result, "R-ASR")


def _evaluate(argv: list[str]) -> None:
    (directory,), argv = _positional(argv, "evaluate", "DIR")
    options = _parse("evaluate", argv, EvaluateFlags)
    from bdjax.vision_language import artifact
    from bdjax.vision_language.measuring import measure_of

    with _progress(options):
        dual = artifact.open_dual(Path(directory))
        result = measure_of(dual, options.test, options.templates, options.images)(dual.variables)
    say(_line("", dataclasses.asdict(result)))
    if options.json:
        say(json.dumps(dataclasses.asdict(result)))


def _import(argv: list[str]) -> None:
    (file,), argv = _positional(argv, "import", "FILE")
    options = _parse("import", argv, ImportFlags)
    from bdjax.interop import clip
    from bdjax.vision_language import artifact
    from bdjax.vision_language.tokenizer import open_tokenizer

    facts = clip.FileFacts(options.activation, options.vision_heads, options.text_heads, options.key)
    config, variables, source = clip.import_clip(Path(file), facts)
    tokenizer = open_tokenizer(options.vocabulary, config.vocabulary, config.context, options.too_long)
    record = {"stage": "imported", "pairs": None, "templates": None, "seed": options.seed, "fit": None, "attack": None,
              "source": source, "parent": None}  # fmt: skip
    manifest = artifact.write(options.out, config, variables, tokenizer, record)
    say(
        f"dual encoder: {options.out} ({config.vision}, {'x'.join(map(str, config.shape))}, names of {source['names']})"
    )
    say("assumed: " + ", ".join(f"{name}={value}" for name, value in source["assumed"].items()))
    if options.json:
        say(json.dumps(manifest))


def _export(argv: list[str]) -> None:
    (directory,), argv = _positional(argv, "export", "DIR")
    options = _parse("export", argv, ExportFlags)
    from bdjax.interop import clip
    from bdjax.vision_language import artifact

    dual = artifact.open_dual(Path(directory))
    count = clip.export_clip(dual.encoder.config, dual.variables, options.out, options.names)
    say(f"{count} tensors: {options.out}")


def _memory(argv: list[str]) -> None:
    options = _parse("memory", argv, MemoryFlags)
    import jax.numpy as jnp

    from bdjax import models
    from bdjax.vision_language.memory import estimate

    with _progress(options):
        memory = estimate(models.PRESETS[options.size], options.batch, options.step, jnp.dtype(options.precision))
    parts = f"{memory.arguments / 2**30:.2f} GiB weights and data, {memory.temporary / 2**30:.2f} GiB activations"
    say(f"{options.size}, {options.batch} pairs, {options.step}: {memory.total / 2**30:.2f} GiB ({parts})")
    if options.json:
        say(json.dumps(dataclasses.asdict(memory)))


@contextlib.contextmanager
def _progress(options: Any) -> Iterator[Any]:
    """Set up jax and the devices for a computing subcommand, and yield a callback that draws a progress bar."""
    from bdjax.cli._devices import prepare_jax
    from bdjax.engine import parallel
    from bdjax.reports.progress import bar
    from bdjax.types import Callback

    class Progress(Callback):
        def on_progress(self, stage: str, done: int, total: int) -> None:
            tick(stage, done, total)

    prepare_jax()
    with bar() as tick, parallel.using(options.devices):
        yield Progress()


def _print_trained(options: Any, manifest: dict[str, Any]) -> None:
    say(f"dual encoder: {options.out}\nnext:         bdjax clip evaluate {options.out}")
    if options.json:
        say(json.dumps(manifest))


def _print_change(options: Any, result: dict[str, Any], asr: str) -> None:
    """Print measurements before and after."""
    before, after = _line("before: ", result["before"]), _line("after:  ", result["after"], asr)
    say(f"{before}\n{after}\nmodel:  {result['directory']}")
    (Path(result["directory"]) / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        say(json.dumps(result))


def _line(label: str, measured: dict[str, Any], asr: str = "ASR") -> str:
    """Describe a measurement in one line."""
    rate = "not measured: no trigger" if measured["asr"] is None else f"{100 * measured['asr']:.2f} %"
    triggered = f" (n={measured['n_triggered']})" if measured["n_triggered"] else ""
    return (
        f"{label}top-1 {100 * measured['top1']:.2f} %, top-5 {100 * measured['top5']:.2f} % (n={measured['n']}, chance "
        f"{100 * measured['chance']:.2f} %), {asr} {rate}{triggered}"
    )
