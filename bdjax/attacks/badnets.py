"""BadNets: stamp a small patch of one colour on the image.

T. Gu, B. Dolan-Gavitt and S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, arXiv:1708.06733.

Threat model: the attacker writes a share of the training set and does not control training.
`x' = x (1 - m) + k m`, where m is the patch's mask and k its colour. The defaults are I-BAU's: a white 4x4 square on
rows and columns 27 to 30 of 32 (a border of one pixel), 20 % of the images, target 8. For other image sizes the side
and the border scale with min(H, W) / 32.

BackdoorBench's variant (3x3 in the corner, 10 %, target 0, any class) is
`size=3 margin=0 ratio=0.1 target=0 exclude_target=False`.

Deviations:

- BAERASER's patch has a random position; its pattern, ratio and target are not stated. Our choice is
  `size=3 margin=0 position=random pattern=0 ratio=0.1 target=0` (a white patch on a white stroke would be invisible).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.attacks._poisoning import PoisonConfig, put, put_anywhere
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The patch and its position."""

    target: int = 8
    """Label that the attacker wants for triggered images."""
    ratio: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    size: int | None = None
    """Side of the square in pixels; default 4 at 32x32, scaled."""
    margin: int | None = None
    """Pixels between the square and the image's edges; default 1 at 32x32, scaled."""
    position: Literal["bottom_right", "bottom_left", "top_right", "top_left", "random"] = "bottom_right"
    """Corner, or a place drawn for each image (uniform over those inside the margin)."""
    colour: tuple[float, ...] = (1.0,)
    """One value for all channels or one for each, in [0, 1]."""
    pattern: int | None = None
    """Seed of one fixed pattern in place of the colour: a value in [0, 1] for each pixel and channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise InputError(f"attack.size must be at least 1 pixel, got {self.size}.")
        if self.margin is not None and self.margin < 0:
            raise InputError(f"attack.margin must not be negative, got {self.margin}.")
        if self.pattern is not None and not 0 <= self.pattern < 2**32:
            raise InputError(f"attack.pattern is a seed, from 0 to 2**32 - 1, got {self.pattern}.")
        if not self.colour or any(not 0 <= value <= 1 for value in self.colour):
            raise InputError(f"attack.colour must hold values in [0, 1], got {self.colour}.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Stamp the patch on images.

    Args:
      config: the patch and its position.
      images: float32 [N, H, W, C] in [0, 1].
      key: random key of the position; used by position="random" only.
      arrays: unused.

    Returns:
      Triggered images, same shape and range.

    Raises:
      InputError: when the patch and its margin do not fit the images, or `colour` does not fit C.
    """
    _, height, width, channels = images.shape
    scale = min(height, width) / 32
    size = config.size if config.size is not None else max(1, round(4 * scale))
    margin = config.margin if config.margin is not None else round(scale)
    if size + margin > min(height, width):
        raise InputError(
            f"attack.size={size} with margin {margin} does not fit images of {height}x{width} pixels. "
            "Use a smaller patch."
        )
    if len(config.colour) not in (1, channels):
        raise InputError(f"attack.colour={config.colour} has {len(config.colour)} values for {channels} channels.")
    last_row, last_column = height - size - margin, width - size - margin
    shape = (size, size, channels)
    if config.pattern is None:
        square = jnp.broadcast_to(jnp.asarray(config.colour, images.dtype), shape)
    else:
        square = jax.random.uniform(jax.random.key(config.pattern), shape, images.dtype)
    if config.position == "random":
        low, high = min(margin, last_row), jnp.array([last_row, last_column]) + 1
        return put_anywhere(images, square, key, low, high)
    row = last_row if "bottom" in config.position else margin
    column = last_column if "right" in config.position else margin
    return put(images, square, jnp.array([row, column]))
