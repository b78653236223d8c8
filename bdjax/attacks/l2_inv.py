"""L2-invisible: add a faint pattern that activates the neurons most strongly connected to the target.

Used by I-BAU (Y. Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022,
arXiv:2110.03735), after S. Li et al., "Invisible Backdoor Attacks on Deep Neural Networks via Steganography and
Regularization", 2020, arXiv:1909.02742.

Threat model: the attacker writes a share of the training set and has a model trained on the clean one. With t >= 0
the pattern, a_j the activation of neuron j of the last hidden layer and A_j its desired value:

    min_t sum_j (A_j - a_j(t))^2,  ||t||_2 = norm;    x' = clip(x + t, 0, 1)

The neurons are those with the largest weights to the target; A_j is `gain` times the neuron's mean absolute activation
on clean images. The defaults are I-BAU's: norm 3.22, 20 % of the images, target 0, the same strength in training and
at test time.

Deviations:

- I-BAU ships a pattern; ours is optimised on `task.clean()`.
- Li et al. start from faint noise and use Adam and a hinge on a norm that shrinks by 0.9. Ours starts from noise of the
  full norm and descends along the normalised gradient, projected after every step (this finds the best direction for
  an L2 norm, which Adam does not).
- Li et al. take A from the noise; ours is taken from clean images, since noise may not change a neuron at all.
- I-BAU does not round poisoned images: `quantise=False`.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.attacks._activations import NeuronConfig, optimise_pattern
from bdjax.attacks._checks import check_positive
from bdjax.types import Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(NeuronConfig):
    """The pattern's norm and the desired activations."""

    norm: float = 3.22
    """L2 norm of the pattern at 32x32x3, in units of [0, 1], positive; other sizes scale it by the root of H W C."""
    gain: float = 10.0
    """A_j, as a multiple of the neuron's mean absolute activation on clean images; positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, gain=10)


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Optimise the pattern on the task's clean model.

    Args:
      config: the pattern's norm and the desired activations.
      task: training set and model.
      key: random key.

    Returns:
      {"pattern": float32 [H, W, C] in [0, 1]}.

    Raises:
      InputError: when no pattern in [0, 1] has the norm, or no neuron reacts to the pattern.
    """
    everywhere = np.ones(task.model.shape, np.float32)
    target = config.target % task.classes  # all_to_all neither uses nor checks the target elsewhere
    pattern = optimise_pattern(
        config, task, key, everywhere, lambda head: head[:, target], lambda means: config.gain * means
    )
    return {"pattern": pattern}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the pattern to images.

    Args:
      config: unused.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: the arrays of :func:`prepare`.

    Returns:
      Triggered images, same shape and range.
    """
    return jnp.clip(images + jnp.asarray(arrays["pattern"]), 0, 1)
