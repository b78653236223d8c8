"""The optimisers of the papers as directions: the caller multiplies by its (traced) learning rate."""

from typing import Any, Literal, TypeAlias

import jax
import optax

Name: TypeAlias = Literal["adam", "sgd"]


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
