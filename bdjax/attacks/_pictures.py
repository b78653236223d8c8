"""Pictures used as triggers: read from a user's file or drawn by a formula, in the size and channels of the images."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.types import ArrayFile, Task, to_float


def read_picture(
    task: Task, field: str, path: ArrayFile, size: tuple[int, int] | None = None, resize: bool = True
) -> np.ndarray:
    """Read a picture from a file and resize it.

    Args:
      task: provides the file reader and the size of the images.
      field: name of the Config field that gives the file, for messages.
      path: a file of shape [H, W], [H, W, 1, 3 or 4] or [1, 3 or 4, H, W].
      size: (height, width) of the result; default the size of the images.
      resize: resize the picture; if False, another size is an error.

    Returns:
      float32 [H, W, 1, 3 or 4] in [0, 1].

    Raises:
      InputError: when the file has another shape or range, or another size and `resize` is False.
    """
    height, width = size or task.model.shape[:2]
    array = task.read_array(path)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # PyTorch's order
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise InputError(
            f"attack.{field}={path} has shape {array.shape}; expected [H, W], [H, W, 1, 3 or 4] or [1, 3 or 4, H, W]."
        )
    picture = to_unit_range(array, field, path)
    if picture.shape[:2] != (height, width):
        if not resize:
            raise InputError(
                f"attack.{field}={path} is {picture.shape[0]}x{picture.shape[1]}, the images are {height}x{width}. "
                "Give a file of their size, or --attack.resize."
            )
        resized = jax.image.resize(picture, (height, width, picture.shape[-1]), "linear")
        return np.asarray(jnp.clip(resized, 0, 1))
    return picture


def to_unit_range(array: np.ndarray, field: str, path: ArrayFile) -> np.ndarray:
    """Convert the content of a file to float32 and check that it is in [0, 1].

    Args:
      array: uint8, or float in [0, 1].
      field: name of the Config field that gives the file, for messages.
      path: the file, for messages.

    Returns:
      float32 in [0, 1], same shape.

    Raises:
      InputError: when the array is empty or has values outside [0, 1].
    """
    if not array.size:
        raise InputError(f"attack.{field}={path} has shape {array.shape}: no pixel. Give a picture.")
    if array.dtype == np.uint8 and array.size and array.max() == 1:
        array = array.astype(np.float32)  # a mask of zeros and ones rather than of 0 to 255
    values = np.asarray(to_float(array))
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise InputError(f"attack.{field}={path} has values outside [0, 1]. Store it as uint8 or scale it.")
    return values


def to_channels(picture: np.ndarray, channels: int, field: str) -> np.ndarray:
    """Convert a picture to the channels of the images: grey is repeated, colour is averaged for grey images.

    Args:
      picture: [..., 1 or 3].
      channels: number of channels of the images.
      field: name of the Config field that gives the picture, for messages.

    Returns:
      [..., channels].

    Raises:
      InputError: when the picture has another number of channels.
    """
    if channels == 1 and picture.shape[-1] == 3:
        picture = picture.mean(-1, keepdims=True)
    if picture.shape[-1] not in (1, channels):
        raise InputError(f"attack.{field} has {picture.shape[-1]} channels, the images have {channels}.")
    return np.broadcast_to(picture, (*picture.shape[:-1], channels))


def pixel_centres(count: int) -> np.ndarray:
    """Return the centres of `count` adjacent pixels that fill (0, 1), float32 [count]."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def draw_bands(height: int, width: int) -> np.ndarray:
    """Draw bright wavy rainbow bands, the default picture, float32 [H, W, 3] in [0, 1].

    `k = (1/2 + sin(2 pi (2 u + c/3) + 3 sin(2 pi v)) / 2) ** 0.3`, with u and v in (0, 1) the horizontal and vertical
    coordinates and c the channel. These are whole periods, so the root mean square is 0.775 at any size.
    """
    v, u = pixel_centres(height)[:, None, None], pixel_centres(width)[:, None]
    phase = 2 * np.pi * (2 * u + np.arange(3) / 3) + 3 * np.sin(2 * np.pi * v)
    return ((0.5 + 0.5 * np.sin(phase)) ** 0.3).astype(np.float32)


def load_picture(task: Task, field: str, path: ArrayFile) -> np.ndarray:
    """Read a picture of the images' size from a user's file, or draw the default one.

    Args:
      task: provides the file reader and the shape of the images.
      field: name of the Config field that gives the file, for messages.
      path: the file; empty: :func:`draw_bands`.

    Returns:
      float32 [H, W, C] in [0, 1]; transparent pixels are composited onto black.

    Raises:
      InputError: when the file does not fit.
    """
    height, width, channels = task.model.shape
    picture = read_picture(task, field, path) if path else draw_bands(height, width)
    if picture.shape[-1] == 4:
        picture = picture[..., :3] * picture[..., 3:]
    return to_channels(picture, channels, field)
