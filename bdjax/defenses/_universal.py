"""One perturbation for all images, by projected gradient ascent on their mean loss."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdjax.engine import parallel, run_epoch
from bdjax.types import Model, to_float


def universal(model: Model, constants: Any, batch_indices: Any, tick: Callable[[int, int], None]) -> jax.Array:
    """Maximise the mean cross-entropy over one perturbation of all images.

    δ starts at zero. Each batch gives one normalised gradient step, followed by a projection onto the L2 ball.

    Args:
      model: the classifier.
      constants: "images" (stored [n, H, W, C]), "labels" [n], "params", "batch_stats", and "hyper" with "step" and
        "norm_bound", L2 lengths in pixel units of [0, 1].
      batch_indices: int [steps, batch], positions of the images of each step.
      tick: called with (steps done, steps).

    Returns:
      δ, float32 [1, H, W, C].
    """
    initial = {"delta": jnp.zeros((1, *model.shape))}
    return run_epoch(_step(model), initial, {"index": batch_indices}, {}, constants, tick=tick)[0]["delta"]


def perturbed_loss(model: Model, delta: jax.Array, params: Any, constants: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy of a batch with δ added to its images.

    Args:
      model: the classifier.
      delta: δ, float32 [1, H, W, C].
      params: parameters of the model.
      constants: as for :func:`universal`.
      batch: "index" int [B], positions of the images.

    Returns:
      The loss, a scalar.
    """
    images, labels = to_float(constants["images"][batch["index"]]) + delta, constants["labels"][batch["index"]]
    logits = model.logits({"params": params, "batch_stats": constants["batch_stats"]}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """Return one ascent step of δ, in the engine's form."""

    def ascend(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        gradient = jax.grad(perturbed_loss, 1)(model, state["delta"], constants["params"], constants, batch)
        gradient = parallel.average(gradient, axis)
        delta = state["delta"] + constants["hyper"]["step"] * gradient / jnp.maximum(jnp.linalg.norm(gradient), 1e-12)
        bound = constants["hyper"]["norm_bound"]
        return {"delta": delta * jnp.minimum(1, bound / jnp.maximum(jnp.linalg.norm(delta), 1e-12))}, {}

    return ascend
