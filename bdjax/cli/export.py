"""`bdjax export`: write the model in a directory as a weight file that PyTorch loads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._devices import prepare_jax
from bdjax.cli._options import CommonFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.cli._paths import check_output_file

ORDER = 43
USAGE = "DIR --format safetensors|torch --out FILE"
SUMMARY = "write the model in DIR as a weight file, with the tensor names and types that it was imported with"
_ENDS = {"safetensors": (".safetensors",), "torch": (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")}


@dataclass(kw_only=True)
class Flags(CommonFlags):
    """Flags of `bdjax export`."""

    format: Literal["safetensors", "torch"]
    """safetensors, or torch: a file for `torch.load(FILE, weights_only=True)`."""
    out: Path
    """File to write; an existing file is replaced."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    source = Path(first_argument("export", argv))
    options = parse_flags("export", (argv[0],), argv[1:], Flags)
    check_output_file(options.out, _ENDS[options.format], f"{options.format} weight")
    prepare_jax()
    from bdjax import interop
    from bdjax.io import checkpoint

    directory = checkpoint.model_directory(source)
    facts = interop.export_model(directory, options.format, options.out)
    say(f"{facts['tensors']} tensors with the names of {facts['names']}, {facts['bytes'] / 1e6:.2f} MB: {options.out}")
    if facts["input"]:
        say("The file does not contain the preprocessing that was given at import. Apply it before the network.")
    if options.json:
        say(json.dumps({"file": str(options.out), "directory": str(directory), **facts}))
