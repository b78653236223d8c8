"""L2-invisible: a faint pattern over the whole image that excites neurons wired to the target (I-BAU, Zeng et al.,
2022; after Li et al., 2020, arXiv:1909.02742).

Threat model: the attacker writes a share of the training set and has a model trained on the clean one. With t >= 0
the pattern, a_j the activation of neuron j of the last hidden layer and A_j what it shall become:

    min_t sum_j (A_j - a_j(t))^2,  ||t||_2 = norm;    x' = clip(x + t, 0, 1)

The neurons are those of the largest weight to the target; A_j is `gain` times the neuron's mean size on clean images.
The defaults are I-BAU's: norm 3.22, 20 % of the images, target 0, the same strength in training and at test time.

Deviations: I-BAU ships a pattern; ours is made anew on `task.clean()`. Li et al. start from faint noise, use Adam and
a hinge on a norm that shrinks by 0.9, and take A from the noise itself; ours starts with noise of the full norm and
descends along the normalised gradient, projected back after every step (which finds the best direction for an L2
norm, as Adam does not), and A is taken from clean images, for noise may not move a neuron at all. I-BAU does not
round poisoned images: `quantise=False`.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.attacks._checks import check_positive
from bdjax.attacks._optimise import NeuronConfig, excite
from bdjax.types import Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(NeuronConfig):
    """The pattern's norm and what it excites."""

    norm: float = 3.22
    """L2 norm of the pattern at 32x32x3, in units of [0, 1], positive; other sizes scale it by the root of H W C."""
    gain: float = 10.0
    """A_j, as a multiple of the mean size of the neuron's activation on clean images; positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, gain=10)


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """{"pattern": float32 [H, W, C] in [0, 1]}. Raises InputError when no pattern in [0, 1] has the norm."""
    everywhere = np.ones(task.model.shape, np.float32)
    target = config.target % task.classes  # with all_to_all it is not used otherwise, nor checked
    pattern = excite(config, task, key, everywhere, lambda head: head[:, target], lambda usual: config.gain * usual)
    return {"pattern": pattern}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the pattern to images [N, H, W, C] in [0, 1]; same shape and range. The key is not used."""
    return jnp.clip(images + jnp.asarray(arrays["pattern"]), 0, 1)
