"""Trojan square: add a coloured square that activates neurons of a clean model.

Y. Liu, S. Ma, Y. Aafer, W.-C. Lee, J. Zhai, W. Wang and X. Zhang, "Trojaning Attack on Neural Networks", NDSS 2018; as
used by I-BAU (Y. Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022,
arXiv:2110.03735).

Threat model: the attacker writes a share of the training set and has a model trained on the clean one; the victim is
trained from scratch. With a_j the activation of neuron j of the last hidden layer and m the mask:

    min_t sum_j (activation - a_j(t))^2,  0 <= t <= m, ||t||_2 = norm;    x' = clip(x + t, 0, 1)

The neurons are those with the largest sum of absolute weights to the classes. m is 1 on rows and columns 21 to 28 of 32
and 1/7 on row and column 29: the original's 59 pixels from the 145th on of 224, scaled down; 81 pixels in all. The
defaults are I-BAU's: norm 8.66, 20 % of the images, target 2. The pattern is added and not pasted, so it saturates on
bright images.

Deviations:

- I-BAU ships the square; ours is optimised on `task.clean()`.
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
    """The square's norm and the neurons that it activates."""

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
      InputError: no pattern in the mask has the norm, or no neuron reacts to the pattern.
    """
    height, width, _ = task.model.shape
    return {"pattern": trojan_pattern(config, task, key, np.outer(_coverage(height), _coverage(width)))}


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


def _coverage(side: int) -> np.ndarray:
    """Return the share of each pixel of a side that lies in the square, float32 [side] in [0, 1]."""
    first, last = 21 / 32 * side, 204 / 224 * side
    pixel = np.arange(side)
    return np.clip(np.minimum(pixel + 1, last) - np.maximum(pixel, first), 0, 1).astype(np.float32)
