"""What every source must satisfy before it becomes Data; each error says which array, what is in it, what to do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.text import visible
from bdjax.types import Data

_MOST_CLASSES = 100_000  # labels that are really something else (an id, a time) must not make a billion names


def make(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any, classes: Sequence[str] | None = None) -> Data:
    """Data from checked arrays.

    Args:
        name: what errors and reports call the set.
        x_train, x_test: uint8 [N, H, W, C] with C 1 or 3, or [N, H, W], which becomes [N, H, W, 1].
        y_train, y_test: integers [N], 0 <= label < classes.
        classes: names by label; None names them "0" to the highest label of both splits.

    Returns Data with contiguous uint8 images and int32 labels. A class may be without images in either split.
    Raises InputError for every breach of the above, for an empty split and for splits of different image shapes.
    """
    x_train, x_test = _images(name, "x_train", x_train), _images(name, "x_test", x_test)
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
    return Data(visible(name), x_train, y_train.astype(np.int32), x_test, y_test.astype(np.int32), names)


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
        channels_first = images.shape[1] in (1, 3)
        remedy = (
            f"This looks like [N, C, H, W]: use {key}.transpose(0, 2, 3, 1)."
            if channels_first
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
    names = tuple(visible(str(c)) for c in classes)
    twice = sorted({c for c in names if names.count(c) > 1}) if len(set(names)) < len(names) else []
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
