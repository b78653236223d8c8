"""Retuning attack (RA): fine-tune a purified model on clean images and a few poisoned ones.

R. Min, Z. Qin, N. L. Zhang, L. Shen and M. Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024, arXiv:2410.09838.

Threat model: the attacker has the purified weights, a small share of the training set and a few poisoned training
images. A backdoor that was only hidden returns. The same attack on a *clean* model is the baseline. The metric is
R-ASR, the ASR of the retuned model.

As in the release: 2 % of the training set, its first `count` images replaced by poisoned ones with the target's label
(at the training strength), SGD 0.01 with momentum 0.9, 5 epochs, batches of 128, batch normalisation in training mode.
BI-BAU prints "0.02 %", which must mean 2 %. Its counts: 5 for BadNets, WaNet, IAD and ISSBA, 1 for Blended, 2 for
Refool, SIG, Narcissus and the adaptive attacks (5 on GTSRB).

Deviations:

- Batches have equal sizes, so that no image is left out.
- Clean images are not augmented.
- Poison of clean-label attacks belongs to the target class, so `payload=triggered` puts the training trigger on other
  images instead; attacks without a poisoned set (WaNet, IAD) always do that.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from bdjax.attacks._poisoning import poisoned_set
from bdjax.errors import InputError, check_fields
from bdjax.types import Backdoor, Key, ReactivationInputs, Task

METRIC = "R-ASR"


@dataclass(frozen=True)
class Config:
    """The attacker's images, and the recipe."""

    count: int = 5
    """Number of poisoned images, at least 1."""
    share: float = 0.02
    """Share of the training set that the attacker has, clean and poisoned together; in (0, 1]."""
    payload: Literal["poisoned", "triggered"] = "poisoned"
    """Images of the attack's own poisoned set, or training images of other classes with the training trigger."""
    epochs: int = 5
    """Passes over the images."""
    batch_size: int = 128
    """Largest number of images per step."""
    learning_rate: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "attack",
            (("count", "epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("share",), "in (0, 1]", lambda v: 0 < v <= 1),
        )


def reactivate(config: Config, inputs: ReactivationInputs, backdoor: Backdoor, task: Task, key: Key) -> Backdoor:
    """Fine-tune the purified model on a few poisoned images among clean ones.

    Args:
      config: hyper-parameters of the attack.
      inputs: the purified variables and `count` poisoned images.
      backdoor: the attack that was planted, with its arrays.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The backdoor with the retuned variables.

    Raises:
      InputError: the share is not larger than the number of poisoned images.
    """
    chosen = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(task.labels)))
    chosen = chosen[: max(1, int(config.share * len(task.labels)))]
    if config.count >= len(chosen):
        raise InputError(
            f"attack.count={config.count} poisoned images do not fit among {len(chosen)} (attack.share={config.share} "
            f"of {len(task.labels)}). Use a larger --attack.share."
        )
    payload = replace(inputs.payload, indices=np.arange(config.count), copies=1)
    images, labels = poisoned_set(payload, task.images[chosen], task.labels[chosen])
    batches = -(-len(chosen) // config.batch_size)
    recipe = {
        "epochs": config.epochs, "batch_size": len(chosen) // batches, "optimizer": "sgd", "weight_decay": 0.0,
        "learning_rate": config.learning_rate, "momentum": config.momentum, "schedule": "constant", "augment": "none",
    }  # fmt: skip
    start = inputs.purified
    variables = task.fit(images, labels, jax.random.fold_in(key, 1), stage="retuning", start=start, recipe=recipe)
    return Backdoor(backdoor.attack, backdoor.config, variables, backdoor.arrays)
