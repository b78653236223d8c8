"""`bdjax export`: a weight file that PyTorch loads, of a model directory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._common import check_file, first, parse, prepare_jax, say
from bdjax.cli._options import Common

ORDER = 43
USAGE = "DIR --format safetensors|torch --out FILE"
SUMMARY = "write a model directory as a weight file, with the names and types that it was imported with"
_ENDS = {"safetensors": (".safetensors",), "torch": (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")}


@dataclass(kw_only=True)
class Flags(Common):
    """Flags of `bdjax export`."""

    format: Literal["safetensors", "torch"]
    """safetensors, or a .pt that `torch.load(FILE, weights_only=True)` takes."""
    out: Path
    """File to write; one that stands there is replaced."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    given = Path(first("export", argv))
    options = parse("export", (argv[0],), argv[1:], Flags)
    check_file(options.out, _ENDS[options.format], f"{options.format} weight")
    prepare_jax()
    from bdjax import interop
    from bdjax.io import checkpoint

    directory = checkpoint.model_directory(given)
    found = interop.export_model(directory, options.format, options.out)
    say(f"{found['tensors']} tensors, named as by {found['names']}, {found['bytes'] / 1e6:.2f} MB: {options.out}")
    if found["input"]:
        say("The weights expect what was done to images before them when they were imported; it is not in the file.")
    if options.json:
        say(json.dumps({"file": str(options.out), "directory": str(directory), **found}))
