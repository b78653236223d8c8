"""A data set in one .npz file, as `numpy.savez_compressed` writes it from x_train, y_train, x_test and y_test.

Pickled arrays are never loaded, so an untrusted file cannot run code.
"""

from pathlib import Path

import numpy as np

from bdjax.datasets import _checks
from bdjax.errors import InputError
from bdjax.io.arrays import MAX_FILE, open_npz
from bdjax.io.files import open_regular
from bdjax.types import Data

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(rest: str) -> Data:
    """Load the data set in a file; its name is the file's stem.

    The file contains uint8 images `x_train` and `x_test` ([N, H, W, C], C 1 or 3, or [N, H, W]), integer labels
    `y_train` and `y_test` [N], and optionally `classes`, the names by label [classes]; without it they are "0" to the
    highest label.

    Args:
      rest: path of the file.

    Returns:
      The data set.

    Raises:
      InputError: when the file does not exist, is not an .npz file, is damaged, is too large once uncompressed, or has
        missing, pickled or invalid arrays.
    """
    if not rest:
        raise InputError("the data set `npz` needs the path of a file. Write `npz:PATH`, for instance `npz:gtsrb.npz`.")
    _checks.check_text("the path of a data set", rest)
    path = Path(rest).expanduser()
    if not path.exists() or path.is_dir():
        problem = "is a folder; did you mean `folder:PATH`?" if path.is_dir() else "does not exist."
        raise InputError(f"npz:{rest}: {path.absolute()} {problem} Give the path of a .npz file.")
    if path.suffix.lower() == ".mat":
        raise InputError(f"{path} is not a .npz file. {_checks.SVHN}.")
    with open_regular(path, MAX_FILE, "an .npz file") as opened:
        is_pickle = opened.read(1) == b"\x80"
    if is_pickle:
        cifar = path.name.startswith(("data_batch", "test_batch")) or path.name in ("train", "test")
        remedy = f" {_checks.CIFAR}." if cifar else " Save its arrays with numpy.savez_compressed."
        raise InputError(f"{path} is not a .npz file but a pickle, and pickles are never loaded.{remedy}")
    with open_npz(path) as file:
        missing = [key for key in KEYS if key not in file.files]
        if missing:
            raise InputError(
                f"{path} has no {', '.join(missing)}; there are {', '.join(file.files) or 'no arrays'}. "
                f"Save the file with the arrays {', '.join(KEYS)} (and optionally classes)."
            )
        x_train, y_train, x_test, y_test = (file[key] for key in KEYS)
        classes = _classes(path, file["classes"]) if "classes" in file.files else None
    return _checks.check_data(path.stem, x_train, y_train, x_test, y_test, classes)


def _classes(path: Path, names: np.ndarray) -> list[str]:
    """Return the array `classes` of a file as text, or raise InputError."""
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise InputError(
            f"classes of {path} is {names.dtype} of shape {list(names.shape)}; it must be a list of names by label. "
            f'Save numpy.array(["cat", "dog", ...]).'
        )
    try:
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
    except UnicodeDecodeError as error:
        raise InputError(f"classes of {path} contains {error.object!r:.80}, which is not UTF-8. Save text.") from None
