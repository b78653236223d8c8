"""`bdjax poisoned`: write the poisoned training set of a victim, for tools that detect poison in data."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._devices import run_context
from bdjax.cli._options import CommonFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.cli._paths import check_output_file
from bdjax.errors import InputError

ORDER = 95
USAGE = "VICTIM_DIR [--dataset D] [--force] --out FILE.npz"
SUMMARY = "write the poisoned training set of VICTIM_DIR, bit for bit, as a data set"


@dataclass(kw_only=True)
class Flags(CommonFlags):
    """Flags of `bdjax poisoned`."""

    out: Path
    """File to write, for use as --dataset npz:FILE: x_train, y_train, x_test, y_test, classes, and the indices of
    poisoned and cover images in x_train as `poisoned`."""
    dataset: str | None = None
    """Data set of the victim, if it has moved: digits, npz:PATH, folder:PATH or tfds:NAME."""
    force: bool = False
    """Replace an existing file."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    directory = Path(first_argument("poisoned", argv))
    options = parse_flags("poisoned", (argv[0],), argv[1:], Flags)
    check_output_file(options.out, ".npz", ".npz")
    if options.out.exists() and not options.force:
        raise InputError(f"--out {options.out} exists already. Choose another --out, or --force to replace it.")
    import numpy as np

    from bdjax.io import checkpoint
    from bdjax.pipelines.poisoned_set import poisoned_set

    with run_context(options):
        data, images, labels, positions = poisoned_set(directory, options.dataset)
    if images.dtype != np.uint8:
        raise InputError(
            f"the poisoned images of {directory} are {images.dtype} (attack.quantise=False), but a data set "
            "file holds uint8. Train a victim without --attack.no-quantise, or call "
            "bdjax.pipelines.poisoned_set.poisoned_set."
        )
    arrays = {
        "x_train": images, "y_train": labels, "x_test": data.x_test, "y_test": data.y_test,
        "classes": np.array(data.classes), "poisoned": positions.astype(np.int32),
    }  # fmt: skip
    checkpoint.check_space(options.out, sum(array.nbytes for array in arrays.values()))
    checkpoint.write_arrays(options.out, arrays)
    manifest = checkpoint.read_record(directory)
    facts = {
        "file": str(options.out),
        "victim": str(directory),
        "attack": manifest["attack"]["name"],
        "poisoned": len(positions),
        "images": len(images),
        "sha256": manifest["poison"]["sha256"],
    }
    say(f"poisoned: {facts['poisoned']} of {facts['images']} training images")
    say(f"sha256:   {facts['sha256']} (of the poison, as in the victim's manifest)")
    say(f"data set: npz:{options.out}")
    if options.json:
        say(json.dumps(facts))
