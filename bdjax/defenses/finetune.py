"""Fine-tuning: train on with clean images, the plainest defense of all and the baseline of the others.

Threat model: the defender has the model and clean labelled images, no trigger.

    min_θ mean CE(f_θ(x), y),     θ from θ_b

What it does to a backdoor is decided by the learning rate and by the statistics of batch normalisation, which follow
the defender's images (training mode). The defaults are BackdoorBench's: SGD 0.01 falling along a cosine, 100 epochs,
random crops. AGE's basicFT is this defense with the recipe of the victim's own training, also the teacher of NAD. What
BAERASER's tables call fine-tuning is another method (with recovered triggers).

Deviations: BackdoorBench flips CIFAR-10's images too (`augment=crop_flip`). A last, smaller batch of an epoch is left
out.
"""

from dataclasses import dataclass
from typing import Literal

from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The recipe."""

    epochs: int = 100
    """Passes over the clean images."""
    batch_size: int = 256
    """Images a step; all of them when there are fewer."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with `momentum`, or Adam."""
    learning_rate: float = 0.01
    """At the first step."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """L2 term added to the gradient."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Cosine to zero, or times 0.1 at 50 % and 75 % of the epochs."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("weight_decay",), "zero or more", lambda v: v >= 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Train the victim on with clean images.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: shuffles and augments them.
    Returns: the variables; the watch is shown them after each epoch.
    Raises InputError for fewer images than devices, and for a loss that is not finite.
    """
    recipe = FitConfig(
        config.epochs, config.batch_size, config.optimizer, config.learning_rate, config.momentum,
        config.weight_decay, config.schedule, config.augment,
    )  # fmt: skip
    return tune(victim, view.images, view.labels, recipe, key, view.callback, "fine-tuning")
