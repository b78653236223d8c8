"""Make the tiny prepared TFDS set under `tests/data/tfds` that `tests/test_datasets.py` reads.

Run once, by hand, from the repository's root; the tests never run it. Writing needs TensorFlow, reading does not:

    python3.12 -m venv /tmp/vtf
    /tmp/vtf/bin/pip install tensorflow-cpu tensorflow-datasets importlib_resources array_record scikit-learn
    /tmp/vtf/bin/python tests/data/make_tfds_fixture.py

The set `tiny_digits` holds scikit-learn's first 30 digits in their order, 20 train and 10 test: 8x8x1 images,
pixel = 15 times the stored value 0..16, so that it stays an exact integer.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits


def main() -> None:
    """Write the set beside this file."""
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[..., None]
    examples = [(i, {"image": images[i], "label": int(digits.target[i])}) for i in range(30)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_digits",
        version="1.0.0",
        config="default",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(names=[f"digit {c}" for c in range(10)]),
            }
        ),
        split_datasets={"train": examples[:20], "test": examples[20:]},
        data_dir=str(Path(__file__).parent / "tfds"),
        description="The first 30 images of scikit-learn's load_digits, for bdjax's tests.",
        file_format="array_record",
        disable_shuffling=True,
    )


if __name__ == "__main__":
    main()
