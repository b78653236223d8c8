"""Clean: no attack, the reference model for backdoored ones.

Its "ASR" is the share of unchanged test images of other classes that are classified as the target, the baseline for
the ASR of an attack. Attacks that edit a trained model start from this one.
"""

from dataclasses import dataclass

from bdjax.attacks._poisoning import PoisonConfig, fit_key
from bdjax.types import Arrays, Backdoor, Images, Key, Task


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The target whose false ASR is counted; the other fields have no effect."""


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Return the images unchanged.

    Args:
      config: unused.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: unused.

    Returns:
      The images.
    """
    return images


def train(config: Config, task: Task, key: Key) -> Backdoor:
    """Train on the unchanged training set.

    Args:
      config: recorded in the result.
      task: training set, model and recipe.
      key: key of :func:`bdjax.attacks.plant`.

    Returns:
      The model, without arrays.
    """
    return Backdoor("clean", config, task.fit(task.images, task.labels, fit_key(key)), {})
