"""What every source must satisfy before it becomes Data; each error says which array, what is in it, what to do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.text import visible
from bdjax.types import Data

_MOST_CLASSES = 100_000  # labels that are really something else (an id, a time) must not make a billion names


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
_DARK = 32  # a highest pixel value below which stored images are hardly of 0..255


def check_text(what: str, name: str) -> None:
    """Raise InputError for a name that is not UTF-8: no report could be written of it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = ascii(name)[1:-1]
        raise InputError(f"{what} is called {shown}, which is not UTF-8. Rename it.") from None


def make(
    name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any, classes: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Data:  # fmt: skip
    """Data from checked arrays.

    Args:
        name: what errors and reports call the set.
        x_train, x_test: uint8 [N, H, W, C] with C 1 or 3, or [N, H, W], which becomes [N, H, W, 1].
        y_train, y_test: integers [N], 0 <= label < classes.
        classes: names by label; None names them "0" to the highest label of both splits.
        notes: what was left out or done to the images, for who reads the results.

    Returns Data with contiguous uint8 images and int32 labels. A class may be without images in either split.
    Raises InputError for every breach of the above, for an empty split and for splits of different image shapes.
    """
    check_text("a data set", name)
    x_train, x_test = _images(name, "x_train", x_train), _images(name, "x_test", x_test)
    notes = [*notes, *_range(name, int(max(x_train.max(), x_test.max())))]
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(
            f"data set {name!r}: images of x_train are {_by(x_train.shape[1:])} and of x_test {_by(x_test.shape[1:])}. "
            "Bring both to one height, width and number of channels."
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
    _in_range(name, "y_train", y_train, len(names))
    _in_range(name, "y_test", y_test, len(names))
    y_train, y_test, notes = y_train.astype(np.int32), y_test.astype(np.int32), [visible(note) for note in notes]
    return Data(visible(name), x_train, y_train, x_test, y_test, names, tuple(notes))


def _range(name: str, top: int) -> list[str]:
    """What to say of the highest pixel value. Raises InputError where it is 1: such images are nearly black."""
    if top == 1:
        raise InputError(
            f"data set {name!r}: its images are uint8 from 0 to 1; stored images go from 0 to 255. Multiply by 255: "
            "(x * 255).astype(numpy.uint8). If they were cast from floats in [0, 1], store them anew: "
            "(x * 255).round().astype(numpy.uint8)."
        )
    return [f"The highest pixel value is {top}: are these images of 0 to 255?"] if 1 < top < _DARK else []


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)


def _images(name: str, key: str, images: Any) -> np.ndarray:
    images = np.asarray(images)
    where = f"data set {name!r}: {key}"
    if images.ndim not in (3, 4):
        raise InputError(f"{where} has shape {list(images.shape)}; images are [N, H, W] or [N, H, W, C]. Reshape them.")
    if len(images) == 0:
        raise InputError(f"{where} is empty (shape {list(images.shape)}): the split needs at least one image.")
    if images.dtype != np.uint8:
        raise InputError(f"{where} is {_found(images)}; stored images are uint8. {_to_uint8(images)}")
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
        raise InputError(f"{where} has shape {list(images.shape)}: an image without pixels. Leave such images out.")
    return np.ascontiguousarray(images)


def _found(array: np.ndarray) -> str:
    """'float32 from 0 to 1': dtype and range."""
    if array.dtype.kind not in "iufb":
        return f"of dtype {array.dtype}"
    return f"{array.dtype} from {array.min():g} to {array.max():g}"


def _to_uint8(images: np.ndarray) -> str:
    if images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1:
        return "Multiply by 255, round and convert: (x * 255).round().astype(numpy.uint8)."
    if images.dtype.kind in "iuf" and images.min() >= 0 and images.max() <= 255:
        return "Convert: x.round().astype(numpy.uint8)."
    return "Scale the pixels to 0..255, round, and convert with .astype(numpy.uint8)."


def _labels(name: str, key: str, labels: Any, images: int) -> np.ndarray:
    labels = np.asarray(labels)
    where = f"data set {name!r}: {key}"
    if labels.ndim != 1:
        one_hot = labels.ndim == 2 and labels.shape[1] > 1
        remedy = f"{key}.argmax(axis=1) if it is one-hot" if one_hot else f"{key}.reshape(-1)"
        raise InputError(f"{where} has shape {list(labels.shape)}; labels are [N], one integer an image. Use {remedy}.")
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where} is of dtype {labels.dtype}; labels are integers. Use {key}.astype(numpy.int32).")
    if len(labels) != images:
        raise InputError(f"{where} has {len(labels)} labels for {images} images. Give one label an image.")
    return labels


def _classes(name: str, classes: Sequence[str]) -> tuple[str, ...]:
    for one in classes:
        check_text(f"a class of data set {name!r}", str(one))
    names = tuple(visible(str(one)) for one in classes)
    twice = sorted({one for one in names if names.count(one) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise InputError(f"data set {name!r}: class name {twice[0]!r} occurs more than once. Make the names distinct.")
    if len(names) < 2:
        raise InputError(
            f"data set {name!r} has {len(names)} class ({', '.join(names)}); a classifier needs 2 or more."
        )
    return names


def _in_range(name: str, key: str, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        i = wrong[0]
        raise InputError(
            f"data set {name!r}: {key}[{i}] is {labels[i]}, but with {classes} classes labels run from 0 to "
            f"{classes - 1} ({len(wrong)} such labels). Renumber the labels, or name every class in `classes`."
        )
