"""`bdjax import`: a model from a weight file of PyTorch's, without PyTorch and without running anything in it."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._common import first, import_options, parse, remove_run, say
from bdjax.cli._options import Common, Foreign

ORDER = 42
USAGE = "FILE [--model M] [--classes C] [--size S] [--input-mean ..] [--input-std ..] [--clean-data D] --out DIR"
_TOLD = ("file", "format", "names", "key", "prefix", "skipped", "ignored", "normalised", "unnamed", "accuracy")
SUMMARY = "make a model directory of a .safetensors, .pt or .pth file; nothing in it is run"


@dataclass(kw_only=True)
class Flags(Foreign, Common):
    """Flags of `bdjax import`."""

    out: Path
    """Directory of the model."""
    force: bool = False
    """Replace a model directory that stands there."""
    clean_data: str | None = None
    """Clean images with labels (digits, npz:PATH, folder:PATH or tfds:NAME): where the file fits several networks, each
    is measured on up to 1,000 of them, and the most accurate one is taken."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    file = Path(first("import", argv))
    options = parse("import", (argv[0],), argv[1:], Flags)
    given = import_options(options)
    from bdjax import interop
    from bdjax.interop import assumptions
    from bdjax.pipelines.environment import environment
    from bdjax.reports.imported import notes

    measure = None
    if options.clean_data:
        from bdjax import datasets
        from bdjax.pipelines.evaluation import measure_on

        data = datasets.load(options.clean_data)
        measure = measure_on(data)
        given["size"] = given["size"] or data.shape[:2]
    if options.force:
        remove_run(options.out)
    manifest = interop.import_model(file, options.out, **given, measure=measure, env=environment())
    source, done = manifest["source"], manifest["input"]
    where = f", under {source['key']!r}" if source["key"] else ""
    say(f"model:  {manifest['model']}, {len(manifest['classes'])} classes, images {manifest['shape']}")
    say(f"file:   {len(source['tensors'])} tensors of {source['format']}{where}, named as by {source['names']}")
    say(f"input:  {_described(done)}")
    for line in assumptions.describe(manifest["assumed"], manifest["tried"], manifest["note"]):
        say(f"network: {line}")
    for line in notes(manifest):
        say(line)
    say(f"result: {options.out}\nnext:   bdjax evaluate {options.out} --data D")
    if options.json:
        kept = {
            name: manifest[name] for name in ("hash", "model", "width", "input", "shape", "variant", "assumed", "tried")
        }
        say(json.dumps({"directory": str(options.out), **kept, "classes": len(manifest["classes"]), **_told(source)}))


def _described(done: dict | None) -> str:
    if done is None:
        return "images in [0, 1] as they are; if the owner normalised them, give --input-mean and --input-std"
    return ", ".join(
        f"{name} {list(value) if isinstance(value, tuple) else value}" for name, value in done.items() if value
    )


def _told(source: dict) -> dict:
    return {name: source[name] for name in _TOLD}
