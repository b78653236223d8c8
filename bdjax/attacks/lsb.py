"""LSB: hide a text in the lowest bits of the pixels, as in steganography.

S. Li, M. Xue, B. Z. H. Zhao, H. Zhu and X. Zhang, "Invisible Backdoor Attacks on Deep Neural
Networks via Steganography and Regularization", 2020, arXiv:1909.02742.

Threat model: the attacker writes a share of the training set, as in BadNets. The trigger is invisible: no value changes
by more than 2^b - 1 of 255. The image is read as 8-bit values in raster order, channels innermost; the b low bits of
value n become the bits n b ... n b + b - 1 of the text (UTF-8, each byte from its highest bit), which is repeated until
the image is full:

    x8' = (x8 and not (2^b - 1)) or bits,    x' = x8' / 255

The defaults are AGE's: 50 % of the images, target 2, with b = 1. The signal consists of single steps of 1/255: train in
float32, since bfloat16 cannot represent them, and without crops, which shift the text.

Deviations:

- AGE states neither the text nor the number of bits. Our text is short enough for grey images of 8x8 pixels. One bit is
  hard to learn; use `bits=2` or 3 in that case.
- Li et al.'s second method, optimised noise, is another attack (l2_inv).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The text and the number of bits that hold it."""

    target: int = 2
    """Label that the attacker wants for triggered images."""
    ratio: float = 0.5
    """Share of the whole training set that is poisoned, in (0, 1]."""
    text: str = "backdoor"
    """Hidden text, repeated over the image; 8 bits a letter."""
    bits: int = 1
    """b, low bits of each value that hold text, 1 to 7."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            raise InputError("attack.text is empty. Give at least one letter.")
        if not 1 <= self.bits <= 7:
            raise InputError(f"attack.bits must be from 1 to 7, got {self.bits}.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Write the text into the low bits of images.

    Args:
      config: the text and the number of bits.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: unused.

    Returns:
      Triggered images rounded to k/255, same shape and range.

    Raises:
      InputError: when the text is longer than the capacity of the images.
    """
    shape, bits = images.shape[1:], config.bits
    text = np.unpackbits(np.frombuffer(config.text.encode(), np.uint8))
    capacity = int(np.prod(shape)) * bits
    if len(text) > capacity:
        raise InputError(
            f"attack.text has {len(text) // 8} bytes, images of {shape[0]}x{shape[1]}x{shape[2]} hold {capacity // 8} "
            f"with {bits} bits a value. Use a shorter text or more bits."
        )
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    hidden = (np.resize(text, capacity).reshape(*shape, bits) * weights).sum(-1, dtype=np.uint8)
    stored = jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)
    return ((stored & jnp.uint8(256 - (1 << bits))) | hidden).astype(images.dtype) / 255
