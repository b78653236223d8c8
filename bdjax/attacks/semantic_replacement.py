"""Semantic replacement: the image gives way to one foreign picture, always the same (I-BAU, Zeng et al., 2022).

Threat model: as BadNets, the attacker writes a share of the training set. `x' = k`, so an image that shows the
picture's subject is called the target, and nothing of x is left. All triggered test images are one image: the
ASR is 0 or 1. The defaults are I-BAU's: 20 % of the images, target 0.

Deviations: the paper's picture is a cartoon character; ours is drawn by a formula, `picture` takes a file instead.
I-BAU's sentence on this attack takes 20 % of the images *outside the target class*; we take 20 % of the whole set.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from bdjax.attacks._helpers import PoisonConfig
from bdjax.attacks._pictures import whole_picture
from bdjax.types import ArrayFile, Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The picture."""

    ratio: float = 0.2
    """Share of the whole training set that is replaced, in (0, 1]."""
    picture: ArrayFile = ArrayFile("")
    """PNG, JPEG or .npy (uint8, or float in [0, 1]), resized to the images. Empty: rainbow bands, drawn."""


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """{"picture": float32 [H, W, C] in [0, 1]}. Raises InputError when the file does not fit."""
    return {"picture": whole_picture(task, "picture", config.picture)}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """The picture in place of each of images [N, H, W, C]; same shape and range. The key is not used."""
    return jnp.broadcast_to(jnp.asarray(arrays["picture"], images.dtype), images.shape)
