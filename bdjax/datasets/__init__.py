"""Labelled image sets with their published split, as stored uint8. `load(spec)` finds the module before the colon.

| spec                  | source                                                                              |
|-----------------------|-------------------------------------------------------------------------------------|
| `digits`              | scikit-learn's 1,797 real digits as 32x32x1; needs no file and no network           |
| `npz:PATH`            | one .npz file with uint8 `x_train y_train x_test y_test` and optional `classes`     |
| `folder:PATH`         | pictures in `train/CLASS/` and `test/CLASS/` (or training, val ...), or in `CLASS/` |
| `tfds:NAME[@FOLDER]`  | a set that TensorFlow Datasets has prepared; reading it does not need TensorFlow    |

Where the sets of the papers come from:

- MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100: `tfds:mnist`, `tfds:fashion_mnist`, `tfds:cifar10`, `tfds:cifar100`
  (100 fine classes). Keras' `mnist.npz` works as `npz:mnist.npz` too.
- CINIC-10: `folder:`, as unpacked: `train/CLASS/*.png` and `test/CLASS/*.png`; its `valid/` is left aside.
- Tiny-ImageNet: `folder:`. `train/CLASS/images/*.JPEG` is read as it is. The published `test/` has no labels: move it
  away, and put each file of `val/images/` into `test/CLASS/`, as `val/val_annotations.txt` names its CLASS.
- GTSRB: its photographs differ in size. Bring them to one size (`mogrify -resize '32x32!' *.ppm` in each class folder)
  for `folder:`, or save one file for `npz:`. `Meta/` is left aside; of a flat `Test/` the images go into class folders.

A set of one's own comes as `path/to/mine.py:REST`, where `mine.py` has `load(rest: str) -> Data`.
"""

from bdjax import registry
from bdjax.errors import InputError
from bdjax.types import Data


def load(spec: str) -> Data:
    """The data set that `spec` names, e.g. "digits", "npz:PATH", "folder:PATH", "tfds:mnist".

    Returns Data with contiguous uint8 images [N, H, W, C], C 1 or 3, and int32 labels [N]; the same spec gives the
    same arrays in the same order, always. Raises InputError for an unknown source and for anything in the set that
    would not work later; the message says what was found, where, and what to do.
    """
    source, _, rest = spec.partition(":")
    module = registry.load("datasets", source)
    if not callable(getattr(module, "load", None)):
        raise InputError(f"{source} has no function `load(rest: str) -> Data`, which makes it a data set: add one.")
    return module.load(rest)
