"""Fine-tuning: continue training on clean images, the simplest defense and the baseline of the others.

Recipe of BackdoorBench: B. Wu et al., "BackdoorBench: A Comprehensive Benchmark of Backdoor Learning", NeurIPS 2022
(Datasets and Benchmarks).

Threat model: the defender has the model and clean labelled images, but no trigger.

    min_θ mean CE(f_θ(x), y),     θ from θ_b

The effect on a backdoor depends on the learning rate and on the BatchNorm statistics, which follow the defender's
images (training mode). The defaults are BackdoorBench's: SGD 0.01 with cosine decay, 100 epochs, random crops. AGE's
basicFT is this defense with the recipe of the victim's own training, which is also the teacher of NAD. What BAERASER's
tables call fine-tuning is another method (with recovered triggers; :mod:`bdjax.defenses.mesa_finetune`).

Deviations:

- BackdoorBench also flips the images of CIFAR-10 (`augment=crop_flip`).
- A last, smaller batch of an epoch is left out.
"""

from dataclasses import dataclass
from typing import Literal

from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the fine-tuning."""

    epochs: int = 100
    """Passes over the clean images."""
    batch_size: int = 256
    """Images per step, at most the number of images."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with `momentum`, or Adam."""
    learning_rate: float = 0.01
    """Learning rate at the first step."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """L2 term that is added to the gradient."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Schedule of the learning rate: constant, cosine to zero, or times 0.1 at 50 % and 75 % of the epochs."""
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
    """Continue the victim's training on clean images.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the variables after each epoch.
      key: shuffles and augments the images.

    Returns:
      The cleaned variables.

    Raises:
      InputError: when there are fewer images than devices, or the loss is not finite.
    """
    recipe = FitConfig(
        config.epochs, config.batch_size, config.optimizer, config.learning_rate, config.momentum,
        config.weight_decay, config.schedule, config.augment,
    )  # fmt: skip
    return tune(victim, view.images, view.labels, recipe, key, view.callback, "fine-tuning")
