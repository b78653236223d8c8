"""Pictures for the attacks: read from a user's file or drawn by a formula, of the images' size and channels."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.types import ArrayFile, Task, to_float


def read_picture(
    task: Task, field: str, path: ArrayFile, size: tuple[int, int] | None = None, resize: bool = True
) -> np.ndarray:
    """The file of `attack.field` as float32 [H, W, 1, 3 or 4] in [0, 1], brought to `size` (default the images').

    Channels may come first. Raises InputError when it has another shape or range, or another size and `resize` is off.
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
    found = checked(array, field, path)
    if found.shape[:2] != (height, width):
        if not resize:
            raise InputError(
                f"attack.{field}={path} is {found.shape[0]}x{found.shape[1]}, the images are {height}x{width}. "
                "Give a file of their size, or --attack.resize."
            )
        resized = jax.image.resize(found, (height, width, found.shape[-1]), "linear")
        return np.asarray(jnp.clip(resized, 0, 1))
    return found


def checked(array: np.ndarray, field: str, path: ArrayFile) -> np.ndarray:
    """What the file of `attack.field` holds as float32. Raises InputError when it is empty or outside [0, 1]."""
    if not array.size:
        raise InputError(f"attack.{field}={path} has shape {array.shape}: no pixel. Give a picture.")
    if array.dtype == np.uint8 and array.size and array.max() == 1:
        array = array.astype(np.float32)  # a mask of zeros and ones, not one of 0 to 255
    found = np.asarray(to_float(array))
    if not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
        raise InputError(f"attack.{field}={path} has values outside [0, 1]. Store it as uint8 or scale it.")
    return found


def to_channels(picture: np.ndarray, channels: int, field: str) -> np.ndarray:
    """A picture [..., 1 or 3] with `channels` channels: grey is repeated, colour is averaged for grey images."""
    if channels == 1 and picture.shape[-1] == 3:
        picture = picture.mean(-1, keepdims=True)
    if picture.shape[-1] not in (1, channels):
        raise InputError(f"attack.{field} has {picture.shape[-1]} channels, the images have {channels}.")
    return np.broadcast_to(picture, (*picture.shape[:-1], channels))


def centres(count: int) -> np.ndarray:
    """The middles of `count` pixels side by side on (0, 1), float32 [count]."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def drawn(height: int, width: int) -> np.ndarray:
    """Bright rainbow bands in waves, float32 [H, W, 3] in [0, 1]: what stands for a photograph.

    `k = (1/2 + sin(2 pi (2 u + c/3) + 3 sin(2 pi v)) / 2) ** 0.3` at u, v in (0, 1) across and down and channel
    c: whole periods, so its root mean square is 0.775 at any size.
    """
    v, u = centres(height)[:, None, None], centres(width)[:, None]
    phase = 2 * np.pi * (2 * u + np.arange(3) / 3) + 3 * np.sin(2 * np.pi * v)
    return ((0.5 + 0.5 * np.sin(phase)) ** 0.3).astype(np.float32)


def whole_picture(task: Task, field: str, path: ArrayFile) -> np.ndarray:
    """The user's file, laid over black where it is transparent, else :func:`drawn`: float32 [H, W, C] of the images."""
    height, width, channels = task.model.shape
    picture = read_picture(task, field, path) if path else drawn(height, width)
    if picture.shape[-1] == 4:
        picture = picture[..., :3] * picture[..., 3:]
    return to_channels(picture, channels, field)
