"""Update directions of the optimisers, and learning-rate schedules; the caller multiplies the two."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Name: TypeAlias = Literal["adam", "amsgrad", "sgd", "nesterov"]
Schedule: TypeAlias = Literal["constant", "cosine", "step"]


def direction(name: Name, momentum: jax.Array | float | None = None) -> optax.GradientTransformation:
    """Return the update direction of an optimiser, without the learning rate.

    A step is `params - rate * update`, so changing the learning rate does not recompile anything.

    Args:
      name: "adam" (betas 0.9 and 0.999), "amsgrad" (Adam with PyTorch's `amsgrad` flag), "sgd", or "nesterov" (SGD with
        Nesterov momentum).
      momentum: momentum of SGD, may be traced; None: plain SGD.

    Returns:
      The optax transformation.
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


def take_step(params: Any, update: Any, rate: Any) -> Any:
    """Take a step: params - rate * update.

    Args:
      params: pytree of arrays.
      update: pytree of the same structure, an update direction.
      rate: learning rate, a scalar.

    Returns:
      The new parameters.
    """
    return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, update))


class _Amsgrad(NamedTuple):
    """State of AMSGrad: number of steps, first and second moments, running maximum of the second moments."""

    steps: jax.Array
    first: Any
    second: Any
    largest: Any


def _amsgrad_init(params: Any) -> _Amsgrad:
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]  # distinct buffers, because they are donated
    return _Amsgrad(jnp.zeros((), jnp.int32), *zeros)


def _amsgrad_update(gradient: Any, state: _Amsgrad, params: Any = None) -> tuple[Any, _Amsgrad]:
    # PyTorch takes the maximum before the bias correction; optax takes it after, which keeps a large first gradient
    steps = state.steps + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.first, gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.second, gradient)
    largest = jax.tree.map(jnp.maximum, state.largest, second)
    mean, variance = (1 - beta ** steps.astype(jnp.float32) for beta in (0.9, 0.999))
    update = jax.tree.map(lambda m, v: m / mean / (jnp.sqrt(v / variance) + 1e-8), first, largest)
    return update, _Amsgrad(steps, first, second, largest)


def learning_rates(schedule: Schedule, peak: float, total: int) -> np.ndarray:
    """Return the learning rate of each step.

    Args:
      schedule: "constant", "cosine" (to zero), or "step" (times 0.1 at 50 % and 75 % of the steps).
      peak: initial learning rate.
      total: number of steps.

    Returns:
      float32 [total].
    """
    if schedule == "cosine":
        rate_of = optax.cosine_decay_schedule(peak, total)
    elif schedule == "step":
        rate_of = optax.piecewise_constant_schedule(peak, {total // 2: 0.1, total * 3 // 4: 0.1})
    else:
        rate_of = optax.constant_schedule(peak)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counter with floats
        return np.broadcast_to(np.asarray(rate_of(jnp.arange(total)), np.float32), (total,))
