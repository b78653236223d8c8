"""Predictions and activations over a whole set, in equal, padded batches: one compiled program a model and shape."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.metrics import tac
from bdjax.models import penultimate
from bdjax.types import Model, Variables, to_float


def predict(model: Model, variables: Variables, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Predicted classes of `images` (stored [N, H, W, C]) in evaluation mode, int32 [N]."""
    return np.zeros(0, np.int32) if len(images) == 0 else _batched(_classes(model), variables, (images,), batch_size)


def feature_map_names(model: Model, variables: Variables) -> tuple[str, ...]:
    """Names of the features that are maps [N, H, W, C], in the order in which the model makes them."""
    found: list[str] = []

    def run(variables: Variables, images: Any) -> None:
        features = model.apply(variables, images)[1]
        found.extend(name for name, value in features.items() if value.ndim == 4)

    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, *model.shape), jnp.float32))
    return tuple(found)


def activations(
    model: Model, variables: Variables, images: np.ndarray, chosen: dict[str, np.ndarray], batch_size: int = 100
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What `images` (stored [N, H, W, C]) activate in evaluation mode, as float32.

    Args: chosen: layer -> int32 [k], its channels wanted.
    Returns: (layer -> [N, H', W', k], the last feature before the head, flat [N, D]).
    """
    return _batched(lambda v, part: _features(model)(v, part, chosen), variables, (images,), batch_size)


def activation_changes(
    model: Model, variables: Variables, clean: np.ndarray, triggered: np.ndarray, batch_size: int = 100
) -> dict[str, np.ndarray]:
    """Trigger-activated change of every channel of every layer: :func:`bdjax.metrics.tac`, float32 [C] each.

    Args: the same images, stored [N, H, W, C], clean and triggered.
    """
    of_image = _batched(_changes(model), variables, (clean, triggered), batch_size)
    return {name: values.mean(0, dtype=np.float64).astype(np.float32) for name, values in of_image.items()}


def _batched(step: Callable, variables: Variables, sets: tuple[np.ndarray, ...], batch_size: int) -> Any:
    """`step(variables, part of each set) -> pytree of [n, ...]` over all N > 0 images, put together again."""
    total = len(sets[0])
    batch = -(-total // -(-total // batch_size))  # equal batches, so that one shape is compiled
    variables = jax.device_put(variables, jax.local_devices()[0])  # a pmapped step leaves some leaves on all devices
    found = []
    for start in range(0, total, batch):
        parts = [images[start : start + batch] for images in sets]
        short = batch - len(parts[0])
        if short:
            parts = [np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) for part in parts]
        out = step(variables, *parts)
        found.append(jax.tree.map(lambda value, kept=batch - short: np.asarray(value)[:kept], out))
    return jax.tree.map(lambda *values: np.concatenate(values), *found)


@lru_cache(maxsize=64)
def _classes(model: Model) -> Callable:
    return jax.jit(
        lambda variables, images: jnp.argmax(model.logits(variables, to_float(images)), -1).astype(jnp.int32)
    )


@lru_cache(maxsize=8)
def _features(model: Model) -> Callable:
    def run(variables: Variables, images: Any, chosen: Any) -> Any:
        features = model.apply(variables, to_float(images))[1]
        wanted = {name: features[name][..., where].astype(jnp.float32) for name, where in chosen.items()}
        return wanted, penultimate(features).astype(jnp.float32)

    return jax.jit(run)


@lru_cache(maxsize=8)
def _changes(model: Model) -> Callable:
    def run(variables: Variables, clean: Any, triggered: Any) -> dict[str, jax.Array]:
        before, after = (model.apply(variables, to_float(images))[1] for images in (clean, triggered))
        of_one = jax.vmap(lambda a, b: tac(a[None], b[None]))
        return {name: of_one(before[name], after[name]) for name in before if before[name].ndim == 4}

    return jax.jit(run)
