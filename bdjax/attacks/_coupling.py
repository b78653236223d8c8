"""Feature coupling: the loss term that the "enhanced" adaptive attacks of BI-BAU add to training.

It pulls the features of poisoned images towards those of the target class. With phi(x) [d] the input of the last layer
in training mode, for the images of a batch after augmentation:

    loss = CE + lambda mean over payload images of |phi(x') - c|^2 / d,
    c = mean of phi over clean images of the target class, a constant in the gradient

Payload images are poisoned images whose label was changed; c is taken over images of the target class without a
trigger. Cover images, and triggered images that belong to the target class anyway, are in neither group. The term is
zero for a batch that lacks one of the two groups.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.attacks._poisoning import CoverConfig
from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import Poison, SampleInfo, Task, TrainingHook

PAYLOAD, CLEAN_TARGET = 1, 2


@dataclass(frozen=True)
class CouplingConfig(CoverConfig):
    """Base of the Configs of attacks that may also control the loss."""

    coupling: float = 0.0
    """lambda, at least 0. 0: the plain attack, which only poisons data; 1: the enhanced attack, which adds the term."""
    coupling_after: int = 10
    """Epochs of training before the coupling begins, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.coupling >= 0:
            raise InputError(f"attack.coupling must not be negative, got {self.coupling}. Use 1, or 0 for none.")
        if self.coupling_after < 0:
            raise InputError(f"attack.coupling_after must not be negative, got {self.coupling_after}. Use 10.")
        if self.coupling and self.labels != "all_to_one":
            raise InputError(f"attack.coupling needs attack.labels all_to_one, got {self.labels}: it has one target.")


def coupling_hook(config: CouplingConfig, task: Task, poison: Poison) -> tuple[TrainingHook, Any] | None:
    """Make the training hook that adds the coupling term.

    Args:
      config: Config of the attack.
      task: training set and model.
      poison: the poisoned images, cover images included.

    Returns:
      The hook and the attacker's arrays, or None when `config.coupling` is 0.
    """
    if not config.coupling:
        return None
    group = np.where(task.labels == config.target, CLEAN_TARGET, 0).astype(np.int8)
    group[poison.indices] = np.where(poison.labels != task.labels[poison.indices], PAYLOAD, 0)
    fixed = {
        "group": group,
        "coupling": np.float32(config.coupling),
        "after": np.int32(config.coupling_after),
        "weight": np.float32(0),
    }
    return TrainingHook(None, penalty=penalty, refresh=update_weight), {"fixed": fixed}


def update_weight(_: Any, attacker: Any, variables: Any, epoch: int, key: Any) -> Any:
    """`TrainingHook.refresh`: set the weight of the term, 0 before epoch `after` and lambda from then on.

    Args:
      _: unused.
      attacker: {"fixed": the arrays of :func:`coupling_hook`}.
      variables: unused.
      epoch: number of the epoch that begins, from 0.
      key: unused.

    Returns:
      The attacker with the new weight.
    """
    fixed = attacker["fixed"]
    weight = jnp.where(epoch >= fixed["after"], fixed["coupling"], jnp.zeros_like(fixed["coupling"]))
    return {**attacker, "fixed": {**fixed, "weight": weight}}


def penalty(_: Any, attacker: Any, features: Any, labels: jax.Array, info: SampleInfo) -> jax.Array:
    """`TrainingHook.penalty`: weight times the mean of |phi - c|^2 / d over the payload images of the whole batch.

    Args:
      _: unused.
      attacker: {"fixed": the arrays of :func:`coupling_hook`}.
      features: activations of the model by name.
      labels: unused.
      info: positions of the images in the training set.

    Returns:
      Scalar: this device's part of the mean times the number of devices, since the engine averages over devices.
    """
    fixed = attacker["fixed"]
    phi = models.penultimate(features).astype(jnp.float32)
    group = fixed["group"][info.position]
    payload, clean = ((group == which).astype(jnp.float32) for which in (PAYLOAD, CLEAN_TARGET))
    clean_count, payload_count = parallel.total((clean.sum(), payload.sum()), info.axis)
    centre = parallel.total(clean @ jax.lax.stop_gradient(phi), info.axis) / jnp.maximum(clean_count, 1)
    distance = ((phi - centre) ** 2).mean(-1)
    mean = (payload * distance).sum() / jnp.maximum(payload_count, 1) * parallel.size(info.axis)
    return fixed["weight"] * jnp.where(clean_count > 0, mean, 0)
