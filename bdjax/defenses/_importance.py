"""Importance of each weight for the clean images, and the distance weighted by it (BAERASER, Eq. 4).

See :mod:`bdjax.defenses.baeraser`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.engine import parallel, run_epoch
from bdjax.types import DefenderView, Model, Variables, to_float


def importance(model: Model, variables: Variables, view: DefenderView, batch_size: int) -> Any:
    """Compute ω: the absolute gradient of the mean cross-entropy over all clean images, in evaluation mode.

    Args:
      model: the classifier.
      variables: its variables.
      view: clean images (stored [n, H, W, C]) and labels [n].
      batch_size: images whose gradient is computed at once.

    Returns:
      A pytree like the parameters.
    """
    total = len(view.labels)
    positions = np.arange(-(-total // batch_size) * batch_size).reshape(
        -1, batch_size
    )  # a last, smaller batch is filled up with weight zero
    batches = {
        "index": jnp.asarray(np.minimum(positions, total - 1)),
        "weight": jnp.asarray((positions < total) / total, jnp.float32),
    }
    constants = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "variables": jax.tree.map(jnp.asarray, dict(variables)),
    }
    initial = {"gradient": jax.tree.map(jnp.zeros_like, variables["params"])}
    state, _ = run_epoch(_gradient_step(model), initial, batches, {}, constants)
    return jax.tree.map(jnp.abs, state["gradient"])


def deviation(params: Any, original: Any, omega: Any) -> jax.Array:
    """Weighted distance Σ ω |θ − θ_0| over a pytree (Eq. 4).

    ω is a constant to derivatives, and the derivative of |·| at 0 is 0 (that of jnp.abs is 1).

    Args:
      params: θ.
      original: θ_0.
      omega: ω.

    Returns:
      The distance, a scalar.
    """

    def weighted_distance(p: jax.Array, o: jax.Array, w: jax.Array) -> jax.Array:
        return (jax.lax.stop_gradient(w * jnp.sign(p - o)) * (p - o)).sum()

    return jax.tree.reduce(jnp.add, jax.tree.map(weighted_distance, params, original, omega))


@lru_cache(maxsize=16)
def _gradient_step(model: Model) -> Callable:
    """Return the accumulation of the mean cross-entropy's gradient over batches, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]

        def loss(params: Any) -> jax.Array:
            logits = model.logits({**constants["variables"], "params": params}, images)
            return (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * batch["weight"]).sum()

        loss_value, gradient = parallel.total(jax.value_and_grad(loss)(constants["variables"]["params"]), axis)
        return {"gradient": jax.tree.map(jnp.add, state["gradient"], gradient)}, {"loss": loss_value}

    return step
