"""Labelled image data sets with their published split, stored as uint8.

`load(spec)` calls the module named before the colon of the specification.

| spec                  | source                                                                              |
|-----------------------|-------------------------------------------------------------------------------------|
| `digits`              | scikit-learn's 1,797 real digits as 32x32x1; needs no file and no network           |
| `npz:PATH`            | one .npz file with uint8 `x_train y_train x_test y_test` and optional `classes`     |
| `folder:PATH`         | pictures in `train/CLASS/` and `test/CLASS/` (or training, val ...), or in `CLASS/` |
| `tfds:NAME[@FOLDER]`  | a set prepared by TensorFlow Datasets; reading it does not need TensorFlow          |

How to obtain the data sets of the papers:

- MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100: `tfds:mnist`, `tfds:fashion_mnist`, `tfds:cifar10`, `tfds:cifar100`
  (100 fine classes). Keras' `mnist.npz` works as `npz:mnist.npz` too.
- CINIC-10: `folder:`, as unpacked: `train/CLASS/*.png` and `test/CLASS/*.png`; its `valid/` is ignored.
- Tiny-ImageNet: `folder:`. `train/CLASS/images/*.JPEG` is read as published. The published `test/` has no labels: move
  it elsewhere, and move each file of `val/images/` to `test/CLASS/`, where `val/val_annotations.txt` names its CLASS.
- GTSRB: its photographs differ in size. Resize them to one size (`mogrify -resize '32x32!' *.ppm` in each class folder)
  for `folder:`, or save one file for `npz:`. `Meta/` is ignored; the images of a flat `Test/` must be moved into class
  folders.

A user-defined data set is given as `path/to/mine.py:REST`, where `mine.py` has a function `load(rest: str) -> Data`.
"""

from bdjax import registry
from bdjax.types import Data


def load(spec: str) -> Data:
    """Load a data set by its specification.

    Args:
      spec: for example "digits", "npz:PATH", "folder:PATH" or "tfds:mnist".

    Returns:
      Data with contiguous uint8 images [N, H, W, C], C 1 or 3, and int32 labels [N]. The same specification always
      returns the same arrays in the same order.

    Raises:
      InputError: when the source is unknown, or when the data set is invalid; the message names the file or array, the
        value and the remedy.
    """
    source, _, rest = spec.partition(":")
    return registry.load("datasets", source).load(rest)
