"""Blended: mix a faint picture into the whole image.

X. Chen, C. Liu, B. Li, K. Lu and D. Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
2017, arXiv:1712.05526.

Threat model: the attacker writes a share of the training set, as in BadNets. With k the picture and s the strength:

    additive   x' = clip(x + s k, 0, 1)
    convex     x' = (1 - s) x + s k

The defaults are I-BAU's: additive, s = 0.2, 20 % of the images, target 1. BI-BAU's (BackdoorBench's) are
`form=convex ratio=0.1 target=0 exclude_target=False`.

Deviations:

- I-BAU's picture is not published. Ours is drawn by a formula and has the same norm, ||s k||_2 = 8.6 at 32x32x3;
  `picture` takes a file instead.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from bdjax.attacks._pictures import load_picture
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import ArrayFile, Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The picture and its strength."""

    target: int = 1
    """Label that the attacker wants for triggered images."""
    ratio: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    form: Literal["additive", "convex"] = "additive"
    """Add the picture, or cross-fade the image with it."""
    strength: float = 0.2
    """s, in (0, 1], in training and at test time."""
    picture: ArrayFile = ArrayFile("")
    """PNG, JPEG or .npy (uint8, or float in [0, 1]), resized to the images. Empty: rainbow bands, drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise InputError(f"attack.strength must be in (0, 1], got {self.strength}. Use 0.2.")


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Read or draw the picture.

    Args:
      config: gives the file.
      task: provides the file reader and the shape of the images.
      key: unused.

    Returns:
      {"picture": float32 [H, W, C] in [0, 1]}.

    Raises:
      InputError: when the file does not fit.
    """
    return {"picture": load_picture(task, "picture", config.picture)}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Blend the picture into images.

    Args:
      config: form and strength.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: the arrays of :func:`prepare`.

    Returns:
      Triggered images, same shape and range.
    """
    image_weight = 1.0 if config.form == "additive" else 1 - config.strength
    return jnp.clip(image_weight * images + config.strength * jnp.asarray(arrays["picture"])[None], 0, 1)
