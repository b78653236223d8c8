"""The optimisers of the papers as directions, and their learning rates: the caller multiplies the two."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Name: TypeAlias = Literal["adam", "amsgrad", "sgd", "nesterov"]
Schedule: TypeAlias = Literal["constant", "cosine", "step"]


def direction(name: Name, momentum: jax.Array | float | None = None) -> optax.GradientTransformation:
    """Update direction of Adam (betas 0.9 and 0.999) or of SGD with `momentum` (may be traced; None: plain SGD).

    "amsgrad" is Adam as PyTorch has it with that flag, "nesterov" SGD with Nesterov's momentum. A step is
    `params - rate * update`, so that other learning rates compile nothing new.
    """
    if name == "adam":
        base = optax.scale_by_adam()
    elif name == "amsgrad":
        base = optax.GradientTransformation(_amsgrad_init, _amsgrad_update)
    elif name == "nesterov":
        base = optax.trace(decay=0 if momentum is None else momentum, nesterov=True)
    else:
        base = optax.identity() if momentum is None else optax.trace(decay=momentum)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            return base.update(gradient, state, params)

    return optax.GradientTransformation(base.init, update)


class _Amsgrad(NamedTuple):
    steps: jax.Array
    first: Any
    second: Any
    largest: Any


def _amsgrad_init(params: Any) -> _Amsgrad:
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]  # apart, for they are donated
    return _Amsgrad(jnp.zeros((), jnp.int32), *zeros)


def _amsgrad_update(gradient: Any, state: _Amsgrad, params: Any = None) -> tuple[Any, _Amsgrad]:
    # optax takes the maximum after the bias is corrected, which keeps a large first gradient for ever; PyTorch before
    steps = state.steps + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.first, gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.second, gradient)
    largest = jax.tree.map(jnp.maximum, state.largest, second)
    mean, variance = (1 - beta ** steps.astype(jnp.float32) for beta in (0.9, 0.999))
    update = jax.tree.map(lambda m, v: m / mean / (jnp.sqrt(v / variance) + 1e-8), first, largest)
    return update, _Amsgrad(steps, first, second, largest)


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
