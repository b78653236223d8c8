"""Data sets prepared by TensorFlow Datasets (TFDS) as array_record files; reading them does not need TensorFlow.

Nothing is downloaded or prepared here: the error for a data set that is not prepared states the command that prepares
it, which does need TensorFlow.
"""

import difflib
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bdjax.datasets import _checks
from bdjax.errors import InputError
from bdjax.io.files import read_record
from bdjax.text import visible
from bdjax.types import Data

TRAIN = "train"
TEST = ("test", "validation")
_NAME = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.+-]+)?(:[0-9.*]+)?")
_INSTALL = 'pip install "bdjax[tfds]"'


def load(rest: str) -> Data:
    """Load a prepared data set; its name is the text before the `@`.

    The data set needs the features `image` (uint8 [H, W, C], C 1 or 3, of one size) and `label` (an integer), a split
    `train`, and a split `test` or, without it, `validation`. Images are in the stored order. Classes are the names of
    the labels, or "0" to the highest label.

    Args:
      rest: `NAME` or `NAME@FOLDER`, where NAME may also be `NAME/CONFIG:VERSION`. FOLDER is a TFDS data folder, by
        default $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      The data set.

    Raises:
      InputError: when the data set is unknown, is not prepared as array_record, lacks a feature or a split, or has
        images of different sizes or invalid arrays.
    """
    name, _, folder = rest.partition("@")
    if not name:
        raise InputError(
            "the data set `tfds` needs a name. Write `tfds:NAME` or `tfds:NAME@FOLDER`, e.g. `tfds:mnist`."
        )
    if not _NAME.fullmatch(name):
        raise InputError(
            f"tfds:{name} is not a TFDS name. Write `tfds:NAME`, or with config and version "
            "`tfds:NAME/CONFIG:1.2.3`; data sets of other collections are not read."
        )
    folder = os.path.expanduser(folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    _check_features(Path(folder) / re.split("[/:]", name)[0])
    builder = _builder(_package(name), name, folder)
    features, splits = builder.info.features, list(builder.info.splits)
    missing = [key for key in ("image", "label") if key not in features]
    if missing:
        raise InputError(
            f"tfds:{name} has no feature {' and no '.join(missing)}; it has {', '.join(features)}. "
            f"Only data sets of labelled images can be read; export others to `npz:`."
        )
    test = next((split for split in TEST if split in splits), None)
    if TRAIN not in splits or test is None:
        raise InputError(
            f"tfds:{name} has the splits {', '.join(splits) or '(none)'}; `{TRAIN}` and {' or '.join(TEST)} are "
            f"needed. Split it yourself and export it to `npz:`."
        )
    x_train, y_train = _read(builder, name, folder, TRAIN)
    x_test, y_test = _read(builder, name, folder, test)
    return _checks.check_data(name, x_train, y_train, x_test, y_test, getattr(features["label"], "names", None))


def _check_features(folder: Path) -> None:
    """Raise InputError when a prepared set names feature classes of another package, which TFDS would import."""
    for path in (path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}features.json")):
        try:
            parts = [read_record(path)]
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}). Prepare the set again.") from None
        while parts:
            part = parts.pop()
            if isinstance(part, dict | list):
                parts += part.values() if isinstance(part, dict) else part
            for key in ("pythonClassName", "python_class_name", "type"):
                feature = part.get(key) if isinstance(part, dict) else None
                if isinstance(feature, str) and "." in feature and not feature.startswith("tensorflow_datasets."):
                    raise InputError(
                        f"{path} names the feature class {visible(feature[:80])!r}, which is not part of TFDS; nothing "
                        "was imported. Export the data set to `npz:` where you trust it."
                    )


def _package(name: str) -> ModuleType:
    """Import tensorflow_datasets, or raise InputError with the command that installs it."""
    try:
        import array_record.python.array_record_module  # noqa: F401  without it TFDS prints a page and fails later
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(f"tfds:{name} needs a package that is not installed ({error}). Run: {_INSTALL}") from error
    if not hasattr(tensorflow_datasets, "builder"):  # TFDS only logs a failure of its own imports
        raise InputError(
            f"tfds:{name}: tensorflow_datasets lacks a package that it needs (see its log). Run: {_INSTALL}"
        )
    return tensorflow_datasets


def _builder(tfds: ModuleType, name: str, folder: str) -> Any:
    """Return the TFDS builder of a prepared data set, or raise InputError."""
    try:
        builder = tfds.builder(name, data_dir=folder)
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # depends on the mistake in the name
        prepared = sorted(p.name for p in Path(folder).glob("[!.]*")) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(name, prepared + tfds.list_builders(with_community_datasets=False), n=1)
        hint = f" Did you mean {near[0]!r}?" if near and near[0] != name else ""
        raise InputError(
            f"tfds:{name} is neither a data set of TFDS nor prepared in {folder} (prepared there: "
            f"{', '.join(prepared[:10]) or 'nothing'}).{hint} The error of TFDS: {str(error).partition(chr(10))[0]} "
            f"For a data set in another folder, write `tfds:{name}@FOLDER`."
        ) from error
    if not builder.is_prepared():
        raise InputError(f"tfds:{name} is not prepared in {folder}. {_how_to_prepare(name, folder)}")
    return builder


def _how_to_prepare(name: str, folder: str) -> str:
    """Return the commands that prepare a data set. `tfds build` is not among them, as it also needs apache_beam."""
    code = f"tfds.builder({name!r}, data_dir={folder!r}, file_format='array_record').download_and_prepare()"
    return (
        f"Preparing it (once, with a network) needs TensorFlow: {_INSTALL} and then "
        f'python -c "import tensorflow_datasets as tfds; {code}"'
    )


def _read(builder: Any, name: str, folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images [N, H, W, C] and labels [N] of one split, as TFDS decodes them, in the stored order."""
    try:
        return _decode(builder.as_data_source(split=split), f"tfds:{name}: images of {split}")
    except NotImplementedError as error:  # raised for such a format; a subclass of RuntimeError, so it comes first
        raise InputError(
            f"tfds:{name} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which cannot be read "
            f"without TensorFlow. Prepare it in another folder FOLDER and use `tfds:{name}@FOLDER`. "
            f"{_how_to_prepare(name, 'FOLDER')}"
        ) from error
    except (RuntimeError, OSError) as error:  # array_record and Pillow raise these on truncated or missing files
        raise InputError(
            f"tfds:{name}: the split {split} in {builder.data_dir} is damaged ({error}). Remove that folder and "
            f"prepare the data set again. {_how_to_prepare(name, folder)}"
        ) from error


def _decode(source: Any, subject: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode all images and labels of a data source; `subject` describes the images in the message."""
    images, labels = np.empty((0, 1, 1, 1), np.uint8), []
    for i, example in enumerate(source):
        image = np.asarray(example["image"])
        if i == 0:
            images = np.empty((len(source), *image.shape), image.dtype)
        if image.shape != images.shape[1:]:
            raise InputError(
                f"{subject} differ in shape: number 0 is {list(images.shape[1:])}, number {i} is {list(image.shape)}. "
                f"Resize them to one shape and save them for `npz:`."
            )
        images[i] = image
        labels.append(example["label"])
    return images, np.asarray(labels)
