"""`bdjax import`: convert a weight file of PyTorch, without PyTorch and without executing anything in the file."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._import_options import import_options
from bdjax.cli._options import CommonFlags, WeightFileFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.cli._paths import remove_run

ORDER = 42
USAGE = "FILE [--model M] [--classes C] [--size S] [--input-mean ..] [--input-std ..] [--clean-data D] --out DIR"
SUMMARY = "convert a .safetensors, .pt or .pth file to a model directory; nothing in the file is executed"
_SOURCE_FACTS = ("file", "format", "names", "key", "prefix", "skipped", "ignored", "normalised", "unnamed", "accuracy")
_MODEL_FACTS = ("hash", "model", "width", "input", "shape", "variant", "assumed", "tried")


@dataclass(kw_only=True)
class Flags(WeightFileFlags, CommonFlags):
    """Flags of `bdjax import`."""

    out: Path
    """Directory to write the model to."""
    force: bool = False
    """Replace an existing model directory."""
    clean_data: str | None = None
    """Data set of labelled clean images: digits, npz:PATH, folder:PATH or tfds:NAME. Where the file fits several
    networks, the most accurate one on up to 1,000 of these images is chosen. Default: the most likely network."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    file = Path(first_argument("import", argv))
    options = parse_flags("import", (argv[0],), argv[1:], Flags)
    file_options = import_options(options)
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
        file_options["size"] = file_options["size"] or data.shape[:2]
    if options.force:
        remove_run(options.out)
    manifest = interop.import_model(file, options.out, **file_options, measure=measure, env=environment())
    source = manifest["source"]
    where = f", under {source['key']!r}" if source["key"] else ""
    say(f"model:  {manifest['model']}, {len(manifest['classes'])} classes, images {manifest['shape']}")
    say(
        f"file:   {len(source['tensors'])} tensors, format {source['format']}{where}, tensor names of {source['names']}"
    )
    say(f"input:  {_describe_preprocessing(manifest['input'])}")
    for line in assumptions.describe(manifest["assumed"], manifest["tried"], manifest["note"]):
        say(f"network: {line}")
    for line in notes(manifest):
        say(line)
    say(f"result: {options.out}\nnext:   bdjax evaluate {options.out} --dataset D")
    if options.json:
        facts = {name: manifest[name] for name in _MODEL_FACTS} | {"classes": len(manifest["classes"])}
        source_facts = {name: source[name] for name in _SOURCE_FACTS}
        say(json.dumps({"directory": str(options.out), **facts, **source_facts}))


def _describe_preprocessing(preprocessing: dict | None) -> str:
    """The preprocessing of images in words."""
    if preprocessing is None:
        return "images in [0, 1] as they are; if the model expects normalised ones, give --input-mean and --input-std"
    return ", ".join(
        f"{name} {list(value) if isinstance(value, tuple) else value}" for name, value in preprocessing.items() if value
    )
