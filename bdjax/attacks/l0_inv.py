"""L0-invisible: set nine pixels of the bottom row to fixed colours.

Used by I-BAU (Y. Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022,
arXiv:2110.03735), after S. Li et al., "Invisible Backdoor Attacks on Deep Neural Networks via Steganography and
Regularization", 2020, arXiv:1909.02742.

Threat model: the attacker writes a share of the training set, as in BadNets. Few pixels change, each without limit:
`x' = x (1 - m) + t`, where m marks the nine pixels and t holds their colours, ||m||_0 = 9, ||t||_2 = 4. Pixels are
replaced, so the black one matters. The defaults are I-BAU's: row 31, columns 23 to 31 of 32, 20 % of the images,
target 0.

Deviations:

- Li et al. find such pixels by optimising the activation of a neuron; I-BAU ships fixed ones, which we use.
- On larger images a pixel is a square of min(H, W) / 32 pixels; on images too narrow for all nine, the rightmost
  remain; on grey images a colour is the mean of its channels.
"""

from dataclasses import dataclass

import numpy as np

from bdjax.attacks._pictures import to_channels
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The pixels."""

    ratio: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    colours: tuple[str, ...] = (
        "000000", "ff00ff", "0000ff", "ffff00", "ffffff", "00ffff", "00ffff", "ff0000", "ffffff",
    )  # fmt: skip
    """Colours from left to right as RRGGBB; the last is in the corner."""
    size: int | None = None
    """Side of each square in pixels; default 1 at 32x32 and below, scaled above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.colours or any(len(c) != 6 or set(c.lower()) - set("0123456789abcdef") for c in self.colours):
            raise InputError(f"attack.colours must be hexadecimal RRGGBB, such as ff00ff; got {self.colours}.")
        if self.size is not None and self.size < 1:
            raise InputError(f"attack.size must be at least 1 pixel, got {self.size}.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Set the pixels of images.

    Args:
      config: the pixels.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: unused.

    Returns:
      Triggered images, same shape and range.

    Raises:
      InputError: when one of the squares is larger than the image.
    """
    _, height, width, channels = images.shape
    size = config.size if config.size is not None else max(1, min(height, width) // 32)
    if size > min(height, width):
        raise InputError(f"attack.size={size} does not fit images of {height}x{width} pixels. Use a smaller one.")
    colours = np.array([list(bytes.fromhex(c)) for c in config.colours[-(width // size) :]], np.float32) / 255
    strip = np.repeat(to_channels(colours, channels, "colours"), size, axis=0)
    return images.at[:, height - size :, width - len(strip) :].set(strip)
