"""`bdjax import`: a model from a weight file of PyTorch's, without PyTorch and without running anything in it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._common import first, parse, prepare_jax, remove_run, say
from bdjax.errors import InputError
from bdjax.options import Common, numbers, whole_numbers

ORDER = 42
USAGE = "FILE [--model M] [--classes C] [--size S] [--input-mean ..] [--input-std ..] --out DIR"
SUMMARY = "make a model directory of a .safetensors, .pt or .pth file; nothing in it is run"


@dataclass(kw_only=True)
class Flags(Common):
    """Flags of `bdjax import`."""

    out: Path
    """Directory of the model."""
    model: str | None = None
    """What the file is of (`bdjax list models`); BackdoorBench's results say it themselves."""
    classes: int | None = None
    """How many; default what the file says, else the outputs of its last layer."""
    size: str = ""
    """Of the images in pixels, 32 or 32,48 (height, width); default what the file or its weights tell, else the
    model's usual: 32 for those of CIFAR, 224 for torchvision's."""
    input_mean: str = ""
    """What the owner subtracted from images in [0, 1], by channel: 0.4914,0.4822,0.4465. BackdoorBench's own are known
    where a result names its data set."""
    input_std: str = ""
    """What the owner divided by afterwards. A network that was given 0 to 255 has 0.00392156862745098."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Which channel the network was given first."""
    layout: Literal["chw", "hwc", "cwh", "whc"] = "chw"
    """How the owner's images lay: the last two exchange height and width."""
    resize: int = 0
    """Side in pixels that the network enlarges or reduces images to before all else; 0: it does not."""
    key: str | None = None
    """Which dictionary of the file holds the weights, where several fit."""
    force: bool = False
    """Replace a model directory that stands there."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    file = Path(first("import", argv))
    options = parse("import", (argv[0],), argv[1:], Flags)
    if options.classes is not None and options.classes < 2:
        raise InputError(f"--classes must be at least 2, got {options.classes}.")
    size = whole_numbers("--size", options.size, "32 or 32,48") if options.size else None
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise InputError(f"--size must be a side in pixels, or height,width; got {options.size!r}.")
    mean = numbers("--input-mean", options.input_mean, "0.4914,0.4822,0.4465")
    std = numbers("--input-std", options.input_std, "0.247,0.243,0.261")
    prepare_jax()
    from bdjax import interop
    from bdjax.models import Input
    from bdjax.provenance import environment

    given = Input(mean, std, options.channels, options.layout, options.resize)
    if options.force:
        remove_run(options.out)
    manifest = interop.import_model(
        file,
        options.out,
        model=options.model,
        classes=options.classes,
        size=None if size is None else (size[0], size[-1]),
        input=None if given == Input() else given,
        key=options.key,
        env=environment(),
    )
    source, done = manifest["source"], manifest["input"]
    where = f", under {source['key']!r}" if source["key"] else ""
    say(f"model:  {manifest['model']}, {len(manifest['classes'])} classes, images {manifest['shape']}")
    say(f"file:   {len(source['tensors'])} tensors of {source['format']}{where}, named as by {source['names']}")
    say(f"input:  {_described(done)}")
    say(f"result: {options.out}\nnext:   bdjax evaluate {options.out} --data D")
    if options.json:
        kept = {name: manifest[name] for name in ("hash", "model", "width", "input", "shape")}
        say(json.dumps({"directory": str(options.out), **kept, "classes": len(manifest["classes"]), **_told(source)}))


def _described(done: dict | None) -> str:
    if done is None:
        return "images in [0, 1] as they are; if the owner normalised them, give --input-mean and --input-std"
    return ", ".join(
        f"{name} {list(value) if isinstance(value, tuple) else value}" for name, value in done.items() if value
    )


def _told(source: dict) -> dict:
    return {name: source[name] for name in ("file", "format", "names", "key", "prefix")}
