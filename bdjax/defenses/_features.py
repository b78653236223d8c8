"""The network's last two layers, as the models of this package name them, and the cosine."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.errors import InputError


def penultimate(features: Mapping[str, jax.Array]) -> jax.Array:
    """What the last dense layer sees, [N, D]: the last entry of a model's features, flattened."""
    last = list(features.values())[-1]
    return last.reshape(len(last), -1)


def head(params: Any) -> jax.Array:
    """The kernel of the last dense layer, [D, classes]. Raises InputError for a model that has no layer "head"."""
    try:
        return params["head"]["kernel"]
    except (KeyError, TypeError, IndexError):
        raise InputError(
            f"the model has no dense layer named 'head' (its parameters: {', '.join(params)}); "
            "methods that read the head's kernel need one."
        ) from None


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of two vectors; 0, with gradient 0, where one of them is 0."""
    scale = jnp.sqrt((a**2).sum() * (b**2).sum() + 1e-20)
    return (a * b).sum() / scale
