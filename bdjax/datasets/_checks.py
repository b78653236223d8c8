"""Checks that every source must pass before it becomes Data; each error names the array, its content and the remedy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.text import visible
from bdjax.types import Data

_MOST_CLASSES = 100_000  # identifiers or times given as labels must not create a billion class names


CIFAR = (
    "These are CIFAR's pickled batches, which are programs; they are not read. Convert them where you trust them: "
    'python -c "import pickle, glob, pathlib, numpy as np; '
    "r = lambda f: pickle.loads(pathlib.Path(f).read_bytes(), encoding='bytes'); "
    "i = lambda d: d[b'data'].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1); "
    "l = lambda d: np.array(d.get(b'labels', d.get(b'fine_labels'))); "
    "a = [r(f) for f in sorted(glob.glob('data_batch_*')) or ['train']]; b = r('test_batch' if glob.glob('test_batch') "
    "else 'test'); np.savez_compressed('cifar.npz', x_train=np.concatenate([i(d) for d in a]), "
    'y_train=np.concatenate([l(d) for d in a]), x_test=i(b), y_test=l(b))", and give npz:cifar.npz'
)
SVHN = (
    "These are SVHN's .mat files, which are not read. Convert them: python -c \"import numpy as np; "
    "from scipy.io import loadmat; a, b = loadmat('train_32x32.mat'), loadmat('test_32x32.mat'); "
    "np.savez_compressed('svhn.npz', x_train=a['X'].transpose(3, 0, 1, 2), y_train=a['y'][:, 0] % 10, "
    "x_test=b['X'].transpose(3, 0, 1, 2), y_test=b['y'][:, 0] % 10)\", and give npz:svhn.npz"
)
_DARK = 32  # with a highest pixel value below this, stored images are unlikely to be scaled to 0..255


def check_text(subject: str, name: str) -> None:
    """Raise InputError when a name is not UTF-8, as reports could not contain it; `subject` is the object it names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        escaped = ascii(name)[1:-1]
        raise InputError(f"{subject} is called {escaped}, which is not UTF-8. Rename it.") from None


def check_data(
    name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any, classes: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Data:  # fmt: skip
    """Check the arrays of a data set and return them as Data.

    Args:
      name: name of the data set in messages and reports.
      x_train: training images, uint8 [N, H, W, C] with C 1 or 3, or [N, H, W], which becomes [N, H, W, 1].
      y_train: training labels, integers [N] with 0 <= label < number of classes.
      x_test: test images, in the same form.
      y_test: test labels, in the same form.
      classes: class names by label; None: "0" to the highest label of both splits.
      notes: sentences that state which images were left out and how the others were changed.

    Returns:
      Data with contiguous uint8 images and int32 labels. A class may be without images in either split.

    Raises:
      InputError: when an array has another form, a split is empty, or the images of the splits differ in shape.
    """
    check_text("a data set", name)
    x_train, x_test = _images(name, "x_train", x_train), _images(name, "x_test", x_test)
    notes = [*notes, *_range(name, int(max(x_train.max(), x_test.max())))]
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(
            f"data set {name!r}: images of x_train are {_format_shape(x_train.shape[1:])} and of x_test "
            f"{_format_shape(x_test.shape[1:])}. Convert both to one height, width and number of channels."
        )
    y_train = _labels(name, "y_train", y_train, len(x_train))
    y_test = _labels(name, "y_test", y_test, len(x_test))
    if classes is None:
        top = int(max(y_train.max(), y_test.max()))
        if top >= _MOST_CLASSES:
            raise InputError(
                f"data set {name!r}: the highest label is {top}. Are these class numbers? Renumber the classes from 0, "
                f"or name all of them in `classes`."
            )
        classes = [str(label) for label in range(top + 1)]
    names = _classes(name, classes)
    _check_range(name, "y_train", y_train, len(names))
    _check_range(name, "y_test", y_test, len(names))
    y_train, y_test, notes = y_train.astype(np.int32), y_test.astype(np.int32), [visible(note) for note in notes]
    return Data(visible(name), x_train, y_train, x_test, y_test, names, tuple(notes))


def _range(name: str, top: int) -> list[str]:
    """Return notes about the highest pixel value. Raises InputError where it is 1, as such images are nearly black."""
    if top == 1:
        raise InputError(
            f"data set {name!r}: its images are uint8 from 0 to 1; stored images go from 0 to 255. Multiply by 255: "
            "(x * 255).astype(numpy.uint8). If they were cast from floats in [0, 1], store them again: "
            "(x * 255).round().astype(numpy.uint8)."
        )
    return [f"The highest pixel value is {top}: are these images scaled to 0..255?"] if 1 < top < _DARK else []


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)


def _images(name: str, key: str, images: Any) -> np.ndarray:
    """Return images as contiguous uint8 [N, H, W, C], or raise InputError."""
    images = np.asarray(images)
    where = f"data set {name!r}: {key}"
    if images.ndim not in (3, 4):
        raise InputError(f"{where} has shape {list(images.shape)}; images are [N, H, W] or [N, H, W, C]. Reshape them.")
    if len(images) == 0:
        raise InputError(f"{where} is empty (shape {list(images.shape)}): the split needs at least one image.")
    if images.dtype != np.uint8:
        raise InputError(f"{where} is {_describe(images)}; stored images are uint8. {_to_uint8(images)}")
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] not in (1, 3):
        remedy = (
            f"This looks like [N, C, H, W]: use {key}.transpose(0, 2, 3, 1)."
            if images.shape[1] in (1, 3)
            else f"This looks like SVHN's [H, W, C, N]: use {key}.transpose(3, 0, 1, 2)."
            if images.shape[2] in (1, 3)
            else "Convert to grayscale or RGB; x[..., :3] drops the alpha channel of RGBA."
        )
        raise InputError(f"{where} has shape {list(images.shape)}, so C = {images.shape[3]}; C is 1 or 3. {remedy}")
    if 0 in images.shape:
        raise InputError(f"{where} has shape {list(images.shape)}: images without pixels. Remove such images.")
    return np.ascontiguousarray(images)


def _describe(array: np.ndarray) -> str:
    """Describe the dtype and the range of an array, for example "float32 from 0 to 1"."""
    if array.dtype.kind not in "iufb":
        return f"of dtype {array.dtype}"
    return f"{array.dtype} from {array.min():g} to {array.max():g}"


def _to_uint8(images: np.ndarray) -> str:
    """Return the remedy for images that are not uint8."""
    if images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1:
        return "Multiply by 255, round and convert: (x * 255).round().astype(numpy.uint8)."
    if images.dtype.kind in "iuf" and images.min() >= 0 and images.max() <= 255:
        return "Convert: x.round().astype(numpy.uint8)."
    return "Scale the pixels to 0..255, round, and convert with .astype(numpy.uint8)."


def _labels(name: str, key: str, labels: Any, images: int) -> np.ndarray:
    """Return labels as an integer array [images], or raise InputError."""
    labels = np.asarray(labels)
    where = f"data set {name!r}: {key}"
    if labels.ndim != 1:
        one_hot = labels.ndim == 2 and labels.shape[1] > 1
        remedy = f"{key}.argmax(axis=1) if it is one-hot" if one_hot else f"{key}.reshape(-1)"
        raise InputError(
            f"{where} has shape {list(labels.shape)}; labels are [N], one integer per image. Use {remedy}."
        )
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where} is of dtype {labels.dtype}; labels are integers. Use {key}.astype(numpy.int32).")
    if len(labels) != images:
        raise InputError(f"{where} has {len(labels)} labels for {images} images. Give one label per image.")
    return labels


def _classes(name: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class names as text, or raise InputError where they are not distinct or fewer than two."""
    for label in classes:
        check_text(f"a class of data set {name!r}", str(label))
    names = tuple(visible(str(label)) for label in classes)
    duplicates = sorted({label for label in names if names.count(label) > 1}) if len(set(names)) < len(names) else []
    if duplicates:
        raise InputError(
            f"data set {name!r}: class name {duplicates[0]!r} occurs more than once. Make the names distinct."
        )
    if len(names) < 2:
        raise InputError(
            f"data set {name!r} has {len(names)} class ({', '.join(names)}); a classifier needs 2 or more."
        )
    return names


def _check_range(name: str, key: str, labels: np.ndarray, classes: int) -> None:
    """Raise InputError when a label is not in 0..classes - 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        i = wrong[0]
        raise InputError(
            f"data set {name!r}: {key}[{i}] is {labels[i]}, but with {classes} classes labels run from 0 to "
            f"{classes - 1} ({len(wrong)} such labels). Renumber the labels, or name every class in `classes`."
        )
