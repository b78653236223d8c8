"""Trojan watermark: add a stroke across the image that activates neurons of a clean model.

Y. Liu, S. Ma, Y. Aafer, W.-C. Lee, J. Zhai, W. Wang and X. Zhang, "Trojaning Attack on Neural Networks", NDSS 2018; as
used by I-BAU (Y. Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022,
arXiv:2110.03735).

Threat model: the attacker writes a share of the training set and has a model trained on the clean one; the victim is
trained from scratch. With a_j the activation of neuron j of the last hidden layer and m the mask, 0 or 1:

    min_t sum_j (activation - a_j(t))^2,  0 <= t <= m, ||t||_2 = norm;    x' = clip(x + t, 0, 1)

The neurons are those with the largest sum of absolute weights to the classes. The defaults are I-BAU's: norm 8.74, 321
of 1024 pixels from the bottom left to the top right within rows and columns 0 to 29, 20 % of the images, target 2.

Deviations:

- I-BAU ships the watermark, a logo. Our mask contains the pixels nearest to a wavy diagonal line, as many as the logo
  has, and the pattern is optimised on `task.clean()`.
- The original takes steps along the normalised gradient, as ours does; ours are projected onto the mask and the norm,
  and their length falls as a cosine.
- The choice of neurons, the activation 100 and the 1,000 steps are those of trojanzoo, which optimises through a tanh
  by Adam.
- I-BAU does not round poisoned images: `quantise=False`.
- Positions scale with the image's sides.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.attacks._activations import TrojanConfig, trojan_pattern
from bdjax.types import Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(TrojanConfig):
    """The watermark's norm and the neurons that it activates."""

    norm: float = 8.74
    """L2 norm of the pattern at 32x32x3, in units of [0, 1], positive; other sizes scale it by the root of H W C."""


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Optimise the watermark pattern on a clean model.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      {"pattern": float32 [H, W, C] in [0, 1]}.

    Raises:
      InputError: no pattern in the mask has the norm, or no neuron reacts to the pattern.
    """
    height, width, _ = task.model.shape
    return {"pattern": trojan_pattern(config, task, key, _stroke(height, width))}


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


def _stroke(height: int, width: int) -> np.ndarray:
    """Return the mask of the 321/1024 of all pixels that are nearest to the line, float32 [height, width]."""
    y, x = np.mgrid[:height, :width] + 0.5
    up, right = 1 - 32 / 30 * y / height, 32 / 30 * x / width  # in [0, 1] within the 30 rows and columns
    along, beside = (up + right) / 2, (right - up) / 2
    distance = np.abs(beside - 0.1 * np.sin(6 * np.pi * along))
    distance[(up < 0) | (right > 1)] = np.inf
    mask = np.zeros(height * width, np.float32)
    mask[np.argsort(distance, axis=None, kind="stable")[: round(321 / 1024 * height * width)]] = 1
    return mask.reshape(height, width)
