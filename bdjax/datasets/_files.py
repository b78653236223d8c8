"""Reading one picture or array, for methods whose Config names a file."""

import numpy as np
from PIL import Image, UnidentifiedImageError

from bdjax.errors import InputError
from bdjax.types import ArrayFile


def read_array(path: ArrayFile) -> np.ndarray:
    """A picture as uint8 [H, W, C], or an .npy array as stored; nothing is unpickled."""
    try:
        if str(path).endswith(".npy"):
            return np.load(path, allow_pickle=False)
        with Image.open(path) as picture:
            modes = {"1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "RGBA", "P": "RGBA"}
            array = np.asarray(picture.convert(modes.get(picture.mode, "RGB")))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}.") from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image or .npy array: {error}") from None
    return array[..., None] if array.ndim == 2 else array
