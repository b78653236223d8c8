"""The optimisers of the papers as directions, and their learning rates: the caller multiplies the two."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Name: TypeAlias = Literal["adam", "sgd"]
Schedule: TypeAlias = Literal["constant", "cosine", "step"]


def direction(name: Name, momentum: jax.Array | float | None = None) -> optax.GradientTransformation:
    """Update direction of Adam (betas 0.9 and 0.999) or of SGD with `momentum` (may be traced; None: plain SGD).

    A step is `params - rate * update`, so that other learning rates compile nothing new.
    """
    if name == "adam":
        base = optax.scale_by_adam()
    else:
        base = optax.identity() if momentum is None else optax.trace(decay=momentum)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            return base.update(gradient, state, params)

    return optax.GradientTransformation(base.init, update)


def learning_rates(schedule: Schedule, peak: float, total: int) -> np.ndarray:
    """Learning rate of each of `total` steps, float32 [total]: constant, cosine to zero, or x0.1 at 50 % and 75 %."""
    if schedule == "cosine":
        of = optax.cosine_decay_schedule(peak, total)
    elif schedule == "step":
        of = optax.piecewise_constant_schedule(peak, {total // 2: 0.1, total * 3 // 4: 0.1})
    else:
        of = optax.constant_schedule(peak)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counter with floats
        return np.broadcast_to(np.asarray(of(jnp.arange(total)), np.float32), (total,))
