"""Sets that TensorFlow Datasets has prepared as array_record files. Reading them needs no TensorFlow; preparing does.

Nothing is downloaded or prepared here: a set that is not there ends in an error with the command that prepares it.
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
    """The prepared set `NAME` or `NAME@FOLDER` (also `NAME/CONFIG:VERSION`), named as in `rest` up to the `@`.

    FOLDER is a TFDS data folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets. The set needs the features
    `image` (uint8 [H, W, C], C 1 or 3, one size) and `label` (an integer), a split `train`, and `test` or, without
    it, `validation`. Images stand in the stored order. Classes are the label's names, or "0" to the highest label.
    Raises InputError for an unknown set, one that is not prepared or not as array_record, missing features or
    splits, images that differ in size, and what `_checks.make` refuses.
    """
    name, _, folder = rest.partition("@")
    if not name:
        raise InputError(
            "the data set `tfds` needs a name. Write `tfds:NAME` or `tfds:NAME@FOLDER`, e.g. `tfds:mnist`."
        )
    if not _NAME.fullmatch(name):
        raise InputError(
            f"tfds:{name} is no name of TFDS's. Write `tfds:NAME`, or with its config and version "
            "`tfds:NAME/CONFIG:1.2.3`; sets of other collections are not read."
        )
    folder = os.path.expanduser(folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    _check_features(Path(folder) / re.split("[/:]", name)[0])
    builder = _builder(_package(name), name, folder)
    features, splits = builder.info.features, list(builder.info.splits)
    missing = [key for key in ("image", "label") if key not in features]
    if missing:
        raise InputError(
            f"tfds:{name} has no feature {' and no '.join(missing)}; it has {', '.join(features)}. "
            f"Only sets of labelled images can be read; export others to `npz:`."
        )
    test = next((split for split in TEST if split in splits), None)
    if TRAIN not in splits or test is None:
        raise InputError(
            f"tfds:{name} has the splits {', '.join(splits) or '(none)'}; `{TRAIN}` and {' or '.join(TEST)} are "
            f"needed. Export it to `npz:` with a split of your own."
        )
    x_train, y_train = _read(builder, name, folder, TRAIN)
    x_test, y_test = _read(builder, name, folder, test)
    return _checks.make(name, x_train, y_train, x_test, y_test, getattr(features["label"], "names", None))


def _check_features(folder: Path) -> None:
    """Raise InputError when a prepared set asks for features of another package, which TFDS would import by name."""
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
                called = part.get(key) if isinstance(part, dict) else None
                if isinstance(called, str) and "." in called and not called.startswith("tensorflow_datasets."):
                    raise InputError(
                        f"{path} asks to import {visible(called[:80])!r}, which is no feature of TFDS's own; nothing "
                        "was run. Export the set to `npz:` where you trust it."
                    )


def _package(name: str) -> ModuleType:
    try:
        import array_record.python.array_record_module  # noqa: F401  without it TFDS prints a page and fails later
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(f"tfds:{name} needs a package that is not installed ({error}). Run: {_INSTALL}") from error
    if not hasattr(tensorflow_datasets, "builder"):  # TFDS logs a failure of its own imports and goes on
        raise InputError(
            f"tfds:{name}: tensorflow_datasets lacks a package that it needs (see its log). Run: {_INSTALL}"
        )
    return tensorflow_datasets


def _builder(tfds: ModuleType, name: str, folder: str) -> Any:
    try:
        builder = tfds.builder(name, data_dir=folder)
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # by kind of mistake in the name
        there = sorted(p.name for p in Path(folder).glob("[!.]*")) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(name, there + tfds.list_builders(with_community_datasets=False), n=1)
        hint = f" Did you mean {near[0]!r}?" if near and near[0] != name else ""
        raise InputError(
            f"tfds:{name} is neither one of TFDS' own sets nor prepared in {folder} (there: "
            f"{', '.join(there[:10]) or 'nothing'}).{hint} TFDS says: {str(error).partition(chr(10))[0]} "
            f"A set in another folder is `tfds:{name}@FOLDER`."
        ) from error
    if not builder.is_prepared():
        raise InputError(f"tfds:{name} is not prepared in {folder}. {_how(name, folder)}")
    return builder


def _how(name: str, folder: str) -> str:
    """The commands that prepare a set. `tfds build` is not among them: it also needs apache_beam."""
    code = f"tfds.builder({name!r}, data_dir={folder!r}, file_format='array_record').download_and_prepare()"
    return (
        f"Preparing it (once, with a network) needs TensorFlow: {_INSTALL} and then "
        f'python -c "import tensorflow_datasets as tfds; {code}"'
    )


def _read(builder: Any, name: str, folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] and labels [N] of one split, as TFDS decodes them, in the stored order."""
    try:
        return _decode(builder.as_data_source(split=split), f"tfds:{name}: images of {split}")
    except NotImplementedError as error:  # as_data_source's for such a format; a RuntimeError, so it stands first
        raise InputError(
            f"tfds:{name} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which cannot be read "
            f"without TensorFlow. Prepare it in another folder FOLDER and use `tfds:{name}@FOLDER`. "
            f"{_how(name, 'FOLDER')}"
        ) from error
    except (RuntimeError, OSError) as error:  # what array_record and Pillow raise on files that are cut off or gone
        raise InputError(
            f"tfds:{name}: the split {split} in {builder.data_dir} is damaged ({error}). Remove that folder and "
            f"prepare the set again. {_how(name, folder)}"
        ) from error


def _decode(source: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.empty((0, 1, 1, 1), np.uint8), []
    for i, example in enumerate(source):
        image = np.asarray(example["image"])
        if i == 0:
            images = np.empty((len(source), *image.shape), image.dtype)
        if image.shape != images.shape[1:]:
            raise InputError(
                f"{what} differ in shape: number 0 is {list(images.shape[1:])}, number {i} is {list(image.shape)}. "
                f"Resize them to one shape and save them for `npz:`."
            )
        images[i] = image
        labels.append(example["label"])
    return images, np.asarray(labels)
