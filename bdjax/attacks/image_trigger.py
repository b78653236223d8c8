"""A user-defined trigger: a picture composited onto the image, with a mask and a strength.

Threat model: the attacker writes a share of the training set, as in BadNets. With p the picture, m its mask in [0, 1]
and s the strength:

    replace   x' = x (1 - m) + p m
    add       x' = x + s m p                 (clipped to [0, 1])
    blend     x' = x (1 - s m) + p s m       (as Blended: Chen et al., 2017, arXiv:1712.05526)
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from bdjax.attacks._pictures import read_picture, to_channels
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import ArrayFile, Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The picture and how it is composited."""

    trigger: ArrayFile = ArrayFile("")
    """PNG, JPEG or .npy (uint8, or float in [0, 1]) of [H, W] or [H, W, 1, 3 or 4]; the fourth channel of a
    picture is its mask. Empty: a checkerboard of 4-pixel squares over the whole image."""
    mask: ArrayFile = ArrayFile("")
    """Picture or .npy [H, W], [H, W, 1 or 3] or [1 or 3, H, W]: opacity of the trigger. Empty: its own alpha channel,
    else opaque everywhere."""
    mode: Literal["replace", "add", "blend"] = "blend"
    """How the picture is composited."""
    strength: float = 0.2
    """s of "add" and "blend", in (0, 1]."""
    resize: bool = True
    """Resize trigger and mask to the images' size (antialiased); otherwise another size is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise InputError(f"attack.strength must be in (0, 1], got {self.strength}.")


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Read the picture and its mask.

    Args:
      config: gives the files.
      task: provides the file reader and the shape of the images.
      key: unused.

    Returns:
      {"pattern": float32 [H, W, C], "mask": float32 [H, W, 1 or C]}, both in [0, 1].

    Raises:
      InputError: when a file has a shape or range that does not fit the images.
    """
    height, width, channels = task.model.shape
    pattern = _checkerboard(height, width)
    if config.trigger:
        pattern = read_picture(task, "trigger", config.trigger, resize=config.resize)
    mask = np.ones((height, width, 1), np.float32)
    if pattern.shape[-1] == 4:
        pattern, mask = pattern[..., :3], pattern[..., 3:]
    if config.mask:
        mask = _mask(read_picture(task, "mask", config.mask, resize=config.resize), channels)
    return {"pattern": to_channels(pattern, channels, "trigger"), "mask": mask}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Composite the picture onto images.

    Args:
      config: mode and strength.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: the arrays of :func:`prepare`.

    Returns:
      Triggered images, same shape and range.
    """
    pattern, mask = jnp.asarray(arrays["pattern"]), jnp.asarray(arrays["mask"])
    strength = 1.0 if config.mode == "replace" else config.strength
    image_weight = 1.0 if config.mode == "add" else 1 - strength * mask
    return jnp.clip(images * image_weight + strength * (mask * pattern)[None], 0, 1)


def _mask(picture: np.ndarray, channels: int) -> np.ndarray:
    """Opacity from a picture: one channel if its colours agree, one for each channel of the images if it has as many,
    else their mean."""
    colours = picture[..., :3] if picture.shape[-1] == 4 else picture
    if (colours == colours[..., :1]).all():
        return colours[..., :1]
    return colours if colours.shape[-1] == channels else colours.mean(-1, keepdims=True)


def _checkerboard(height: int, width: int) -> np.ndarray:
    """Black and white squares of four pixels, float32 [H, W, 1]."""
    rows, columns = np.arange(height)[:, None] // 4, np.arange(width)[None] // 4
    return ((rows + columns) % 2).astype(np.float32)[..., None]
