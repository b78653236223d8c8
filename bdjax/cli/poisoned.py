"""`bdjax poisoned`: what a victim learnt from, for tools that look for poison in a data set."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._common import check_file, first, parse, ready, say
from bdjax.cli._options import Common
from bdjax.errors import InputError

ORDER = 95
USAGE = "VICTIM_DIR [--dataset D] [--force] --out FILE.npz"
SUMMARY = "write the poisoned training set that VICTIM_DIR learnt from, bit for bit, as a data set"


@dataclass(kw_only=True)
class Flags(Common):
    """Flags of `bdjax poisoned`."""

    out: Path
    """File to write, which --dataset npz:FILE reads: x_train and y_train (poison and cover images are in them, at the
    positions `poisoned`), x_test, y_test and classes."""
    dataset: str | None = None
    """Where the victim's data set lies now, if it has moved."""
    force: bool = False
    """Replace a file that stands there."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    directory = Path(first("poisoned", argv))
    options = parse("poisoned", (argv[0],), argv[1:], Flags)
    check_file(options.out, ".npz", ".npz")
    if options.out.exists() and not options.force:
        raise InputError(f"--out {options.out} is there already. Choose another --out, or --force to replace it.")
    import numpy as np

    from bdjax.io import checkpoint
    from bdjax.pipelines import victim

    with ready(options):
        data, images, labels, positions = victim.poisoned_set(directory, options.dataset)
    if images.dtype != np.uint8:
        raise InputError(
            f"the poisoned images of {directory} are {images.dtype} (attack.quantise=False keeps them so), and a data "
            "set file holds uint8. Train a victim without --attack.no-quantise, or call "
            "bdjax.pipelines.victim.poisoned_set."
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
