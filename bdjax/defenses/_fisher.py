"""The diagonal Fisher information of a model, and elastic weight consolidation (EWC) with it.

J. Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv:1612.00796.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.types import Model, Variables, to_float


def fisher(model: Model, variables: Variables, images: Any, labels: Any, size: int, cap: float = math.inf) -> Any:
    """Estimate the diagonal Fisher information: the mean over examples of (∂ log p(y|x) / ∂θ)².

    Each example is differentiated separately (vmap), because the squared gradient of a batch is a different, smaller
    quantity.

    Args:
      model: the classifier.
      variables: its variables; evaluation mode.
      images: stored [n, H, W, C].
      labels: [n].
      size: examples whose gradients are held in memory at once.
      cap: upper bound of an entry, applied after scaling.

    Returns:
      A pytree like the parameters, scaled to mean one over all entries, then clipped to at most `cap`.
    """
    squared_gradients, total = _squares(model), jax.tree.map(jnp.zeros_like, variables["params"])
    for start in range(0, len(labels), size):
        positions = np.arange(start, start + size)
        weight = jnp.asarray(positions < len(labels), jnp.float32)
        positions = np.minimum(positions, len(labels) - 1)  # one shape is compiled
        part_sum = squared_gradients(variables, to_float(images[positions]), jnp.asarray(labels[positions]), weight)
        total = jax.tree.map(jnp.add, total, part_sum)
    count = sum(leaf.size for leaf in jax.tree.leaves(total))
    mean = sum(leaf.sum() for leaf in jax.tree.leaves(total)) / count
    return jax.tree.map(lambda leaf: jnp.minimum(leaf / jnp.maximum(mean, 1e-30), cap), total)


@lru_cache(maxsize=16)
def _squares(model: Model) -> Callable:
    """Compile the weighted sum of the squared per-example gradients of a batch."""

    def loss(params: Any, stats: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        logits = model.logits({"params": params, "batch_stats": stats}, image[None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, label[None])[0]

    def squared_gradients(variables: Variables, images: jax.Array, labels: jax.Array, weight: jax.Array) -> Any:
        per_example_gradient = jax.vmap(jax.grad(loss), (None, None, 0, 0))
        gradients = per_example_gradient(variables["params"], variables["batch_stats"], images, labels)
        return jax.tree.map(lambda g: jnp.tensordot(weight, g**2, 1), gradients)

    return jax.jit(squared_gradients)


def ewc_penalty(params: Any, original: Any, importance: Any) -> jax.Array:
    """EWC penalty Σ F (θ − θ_b)² over a pytree (BI-BAU, Eq. 23).

    Args:
      params: θ.
      original: θ_b, a pytree like `params`.
      importance: F, a pytree like `params`.

    Returns:
      The penalty, a scalar.
    """
    terms = jax.tree.map(lambda p, o, f: (f * (p - o) ** 2).sum(), params, original, importance)
    return jax.tree.reduce(jnp.add, terms)
