"""LSB: a text written into the lowest bits of the pixels, as steganographers do (Li et al., 2020, arXiv:1909.02742).

Threat model: as BadNets, the attacker writes a share of the training set, here one that cannot be seen: no value
moves by more than 2^b - 1 of 255. The image is taken as 8-bit values in raster order, channels innermost; value
n gives its b low bits to the bits n b ... n b + b - 1 of the text (UTF-8, each byte from its highest bit), which is
repeated until the image is full:

    x8' = (x8 and not (2^b - 1)) or bits,    x' = x8' / 255

The defaults are AGE's: 50 % of the images, target 2, with b = 1. The cue lies in single steps of 1/255: train in
float32, for bfloat16 cannot hold them, and without crops, which move the text.

Deviations: AGE does not say which text or how many bits. Ours is short enough for images of 8x8 grey pixels. One
bit is hard to learn; `bits=2` or 3 is the remedy. Li et al.'s second method, optimised noise, is another attack.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.attacks._helpers import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The text and the bits it takes."""

    target: int = 2
    """Label that a triggered image shall get."""
    ratio: float = 0.5
    """Share of the whole training set that is poisoned, in (0, 1]."""
    text: str = "backdoor"
    """What is hidden, repeated over the image; 8 bits a letter."""
    bits: int = 1
    """b, low bits of each value that hold text, 1 to 7."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            raise InputError("attack.text is empty. Give at least one letter.")
        if not 1 <= self.bits <= 7:
            raise InputError(f"attack.bits must be from 1 to 7, got {self.bits}.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Write the text into images [N, H, W, C] in [0, 1], rounded to k/255; same shape and range. No key is used.

    Raises: InputError when the text is longer than the image holds.
    """
    shape, bits = images.shape[1:], config.bits
    text = np.unpackbits(np.frombuffer(config.text.encode(), np.uint8))
    room = int(np.prod(shape)) * bits
    if len(text) > room:
        raise InputError(
            f"attack.text has {len(text) // 8} bytes, images of {shape[0]}x{shape[1]}x{shape[2]} hold {room // 8} "
            f"with {bits} bits a value. Use a shorter text or more bits."
        )
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    hidden = (np.resize(text, room).reshape(*shape, bits) * weights).sum(-1, dtype=np.uint8)
    stored = jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)
    return ((stored & jnp.uint8(256 - (1 << bits))) | hidden).astype(images.dtype) / 255
