"""Feature coupling, what "enhanced" adaptive attacks add to training: poisoned images shall look like the target class
to the last layer (BI-BAU).

With phi(x) [d] what the last layer is given, in training mode, and a batch's images after augmentation:

    loss = CE + lambda mean over payload images of |phi(x') - c|^2 / d,
    c = the mean of phi over clean images of the target class, a constant to the gradient

Payload are poisoned images whose label was changed; c is of images of the target class that carry no trigger. Covers,
and triggered images that were of the target class anyway, are neither. A batch without one of the two costs nothing.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.attacks._helpers import CoverConfig
from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import Poison, SampleInfo, Task, TrainingHook

PAYLOAD, CLEAN_TARGET = 1, 2


@dataclass(frozen=True)
class CouplingConfig(CoverConfig):
    """For attacks that may also control the loss."""

    coupling: float = 0.0
    """lambda, at least 0. 0: the plain attack, which writes data only; 1: enhanced, by a loss of the attacker's."""
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


def coupled(config: CouplingConfig, task: Task, poison: Poison) -> tuple[TrainingHook, Any] | None:
    """What an attack's `control` gives: the penalty and its arrays, or None without coupling."""
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
    return TrainingHook(None, penalty=penalty, refresh=switch), {"fixed": fixed}


def switch(_: Any, attacker: Any, variables: Any, epoch: int, key: Any) -> Any:
    """`TrainingHook.refresh`: the penalty's weight is 0 before `after` epochs, then `coupling`."""
    fixed = attacker["fixed"]
    weight = jnp.where(epoch >= fixed["after"], fixed["coupling"], jnp.zeros_like(fixed["coupling"]))
    return {**attacker, "fixed": {**fixed, "weight": weight}}


def penalty(_: Any, attacker: Any, features: Any, labels: jax.Array, info: SampleInfo) -> jax.Array:
    """`TrainingHook.penalty`: weight times the mean of |phi - c|^2 / d over the payload of the whole batch.

    Each device gives its images' part times the number of devices, for the engine averages over them.
    """
    fixed = attacker["fixed"]
    phi = models.penultimate(features).astype(jnp.float32)
    group = fixed["group"][info.position]
    payload, clean = ((group == which).astype(jnp.float32) for which in (PAYLOAD, CLEAN_TARGET))
    count, pulled = parallel.total((clean.sum(), payload.sum()), info.axis)
    centre = parallel.total(clean @ jax.lax.stop_gradient(phi), info.axis) / jnp.maximum(count, 1)
    distance = ((phi - centre) ** 2).mean(-1)
    mean = (payload * distance).sum() / jnp.maximum(pulled, 1) * parallel.size(info.axis)
    return fixed["weight"] * jnp.where(count > 0, mean, 0)
