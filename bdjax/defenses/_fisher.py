"""How much the loss minds each weight: the diagonal Fisher information, and elastic weight consolidation with it."""

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
    """Diagonal Fisher: the mean over examples of (∂ log p(y|x) / ∂θ)², a pytree like the parameters, scaled to mean
    one; entries above `cap` are then cut down to it.

    Each example is differentiated by itself (vmap): the square of a batch's gradient is another, smaller thing.

    Args: images: stored [n, H, W, C]; labels [n]; size: examples whose gradients are held at once.
    """
    program, total = _squares(model), jax.tree.map(jnp.zeros_like, variables["params"])
    for begin in range(0, len(labels), size):
        part = np.arange(begin, begin + size)
        weight = jnp.asarray(part < len(labels), jnp.float32)
        part = np.minimum(part, len(labels) - 1)  # one shape is compiled
        found = program(variables, to_float(images[part]), jnp.asarray(labels[part]), weight)
        total = jax.tree.map(jnp.add, total, found)
    count = sum(leaf.size for leaf in jax.tree.leaves(total))
    mean = sum(leaf.sum() for leaf in jax.tree.leaves(total)) / count
    return jax.tree.map(lambda leaf: jnp.minimum(leaf / jnp.maximum(mean, 1e-30), cap), total)


@lru_cache(maxsize=16)
def _squares(model: Model) -> Callable:
    def one(params: Any, stats: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        logits = model.logits({"params": params, "batch_stats": stats}, image[None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, label[None])[0]

    def run(variables: Variables, images: jax.Array, labels: jax.Array, weight: jax.Array) -> Any:
        each = jax.vmap(jax.grad(one), (None, None, 0, 0))
        gradients = each(variables["params"], variables["batch_stats"], images, labels)
        return jax.tree.map(lambda g: jnp.tensordot(weight, g**2, 1), gradients)

    return jax.jit(run)


def ewc_penalty(params: Any, original: Any, weights: Any) -> jax.Array:
    """Σ F (θ − θ_b)² over a pytree (Eq. 23)."""
    terms = jax.tree.map(lambda p, o, f: (f * (p - o) ** 2).sum(), params, original, weights)
    return jax.tree.reduce(jnp.add, terms)
