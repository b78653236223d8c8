"""Clean: no attack at all, the model that a backdoored one is compared with.

Its "ASR" is the share of unchanged test images of other classes that are taken for the target: what an attack has to
beat. Attacks on a model that is there already begin with this one.
"""

from dataclasses import dataclass

from bdjax.attacks._helpers import PoisonConfig, fit_key
from bdjax.types import Arrays, Backdoor, Images, Key, Task


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The target that the false ASR is counted for; the other fields have no effect."""


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """The images [N, H, W, C] as they are."""
    return images


def train(config: Config, task: Task, key: Key) -> Backdoor:
    """Train on the training set as it is."""
    return Backdoor("clean", config, task.fit(task.images, task.labels, fit_key(key)), {})
