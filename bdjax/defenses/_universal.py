"""One perturbation for all images, by projected gradient ascent of their mean loss."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdjax.engine import parallel, run_epoch
from bdjax.types import Model, to_float


def universal(model: Model, shared: Any, index: Any, tick: Callable[[int, int], None]) -> jax.Array:
    """δ, float32 [1, H, W, C], from zero: a step on each batch, then back into the ball.

    Args:
      shared: "images" (stored [n, H, W, C]), "labels" [n], "params", "batch_stats", and "hyper" with "step" and
        "norm_bound", L2 lengths in pixel units of [0, 1].
      index: int [steps, batch], images of each step.
    """
    start = {"delta": jnp.zeros((1, *model.shape))}
    return run_epoch(_step(model), start, {"index": index}, {}, shared, tick=tick)[0]["delta"]


def loss_of(model: Model, delta: jax.Array, params: Any, shared: Any, split: Any) -> jax.Array:
    """Mean cross-entropy of a batch with δ added."""
    images, labels = to_float(shared["images"][split["index"]]) + delta, shared["labels"][split["index"]]
    logits = model.logits({"params": params, "batch_stats": shared["batch_stats"]}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    def ascend(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        gradient = jax.grad(loss_of, 1)(model, state["delta"], shared["params"], shared, split)
        gradient = parallel.average(gradient, axis)
        delta = state["delta"] + shared["hyper"]["step"] * gradient / jnp.maximum(jnp.linalg.norm(gradient), 1e-12)
        bound = shared["hyper"]["norm_bound"]
        return {"delta": delta * jnp.minimum(1, bound / jnp.maximum(jnp.linalg.norm(delta), 1e-12))}, {}

    return ascend
