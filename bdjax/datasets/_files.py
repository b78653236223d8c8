"""Reading of a picture or an array that a method's Config names."""

from pathlib import Path

import numpy as np

from bdjax.io.arrays import open_picture, read_npy
from bdjax.types import ArrayFile

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def read_array(path: ArrayFile) -> np.ndarray:
    """Read a picture as uint8 [H, W, C], or an .npy array as stored; nothing is unpickled.

    Args:
      path: path of the file.

    Returns:
      The array; one with two dimensions gets a third of size 1.

    Raises:
      InputError: when the file does not exist, is not a regular file, is too large, or is damaged.
    """
    if str(path).endswith(".npy"):
        array = read_npy(Path(path))
    else:
        with open_picture(Path(path), _FORMATS, f"picture ({', '.join(_FORMATS)}) or .npy array") as picture:
            modes = {"1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "RGBA", "P": "RGBA"}
            array = np.asarray(picture.convert(modes.get(picture.mode, "RGB")))
    return array[..., None] if array.ndim == 2 else array
