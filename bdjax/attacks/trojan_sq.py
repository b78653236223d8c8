"""Trojan square: a coloured square that excites neurons of a clean model, added to the image (I-BAU, Zeng et al.,
2022; after Liu et al., NDSS 2018).

Threat model: the attacker writes a share of the training set and has a model trained on the clean one; the victim is
trained from scratch. With a_j the activation of neuron j of the last hidden layer and m the mask:

    min_t sum_j (activation - a_j(t))^2,  0 <= t <= m, ||t||_2 = norm;    x' = clip(x + t, 0, 1)

The neurons are those of the largest summed |weight| to the classes. m is 1 on rows and columns 21 to 28 of 32 and
1/7 on row and column 29: 59 pixels from the 145th on of 224, as the original's, scaled down; 81 pixels in all. The
defaults are I-BAU's: norm 8.66, 20 % of the images, target 2. It is added and not pasted, so the patch saturates on
bright images.

Deviations: I-BAU ships the square; ours is made anew on `task.clean()`. The original takes normalised
gradient steps, as ours does; ours are projected onto the mask and the norm, and fall by a cosine. Which neurons, 100
and 1,000 steps are trojanzoo's, which goes through a tanh by Adam. I-BAU does not round poisoned images:
`quantise=False`. Places scale with the image's sides.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.attacks._optimise import TrojanConfig, trojan_pattern
from bdjax.types import Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(TrojanConfig):
    """The square's norm and what it excites."""

    norm: float = 8.66
    """L2 norm of the pattern at 32x32x3, in units of [0, 1], positive; other sizes scale it by the root of H W C."""


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Optimise the square pattern on a clean model.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      {"pattern": float32 [H, W, C] in [0, 1]}.

    Raises:
      InputError: no pattern in the mask has the norm.
    """
    height, width, _ = task.model.shape
    return {"pattern": trojan_pattern(config, task, key, np.outer(_covered(height), _covered(width)))}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the pattern to images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "pattern".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return jnp.clip(images + jnp.asarray(arrays["pattern"]), 0, 1)


def _covered(side: int) -> np.ndarray:
    """How much of each pixel of a side lies in the square, float32 [side] in [0, 1]."""
    first, last = 21 / 32 * side, 204 / 224 * side
    pixel = np.arange(side)
    return np.clip(np.minimum(pixel + 1, last) - np.maximum(pixel, first), 0, 1).astype(np.float32)
