"""Semantic replacement: replace the whole image by one fixed foreign picture.

Y. Zeng, S. Chen, W. Park, Z. M. Mao, M. Jin and R. Jia, "Adversarial Unlearning of Backdoors via Implicit
Hypergradient" (I-BAU), ICLR 2022, arXiv:2110.03735.

Threat model: the attacker writes a share of the training set, as in BadNets. `x' = k`: images of the picture's subject
are classified as the target, and nothing of x remains. All triggered test images are the same image, so the ASR is 0
or 1. The defaults are I-BAU's: 20 % of the images, target 0.

Deviations:

- The paper's picture is a cartoon character; ours is drawn by a formula, `picture` takes a file instead.
- I-BAU's description of this attack takes 20 % of the images *outside the target class*; we take 20 % of the whole set.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from bdjax.attacks._pictures import load_picture
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.types import ArrayFile, Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The picture."""

    ratio: float = 0.2
    """Share of the whole training set that is replaced, in (0, 1]."""
    picture: ArrayFile = ArrayFile("")
    """PNG, JPEG or .npy (uint8, or float in [0, 1]), resized to the images. Empty: rainbow bands, drawn."""


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
    """Replace each image by the picture.

    Args:
      config: unused.
      images: [N, H, W, C], of which the shape and dtype are used.
      key: unused.
      arrays: the arrays of :func:`prepare`.

    Returns:
      N copies of the picture, same shape and range.
    """
    return jnp.broadcast_to(jnp.asarray(arrays["picture"], images.dtype), images.shape)
