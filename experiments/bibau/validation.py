"""A data set to choose settings on: every fifth training image takes the place of the test set.

    python experiments/bibau/validation.py npz:gtsrb.npz validation.npz
    bdjax sweep experiments/bibau/table2.py --datasets gtsrb=npz:validation.npz --seeds 100

It measures nothing and has therefore no cells: it writes one file, in seconds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from bdjax import datasets


@dataclass(frozen=True)
class Options:
    """Options of the data set."""

    source: tyro.conf.Positional[str]
    """The data set: digits, npz:PATH, folder:PATH or tfds:NAME."""
    out: tyro.conf.Positional[Path]
    """The .npz file that is written."""


def main(options: Options) -> None:
    """Write the data set."""
    data = datasets.load(options.source)
    held_out = np.arange(len(data.y_train)) % 5 == 4
    x, y = data.x_train, data.y_train
    np.savez(
        options.out,
        x_train=x[~held_out],
        y_train=y[~held_out],
        x_test=x[held_out],
        y_test=y[held_out],
        classes=np.asarray(data.classes),
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
