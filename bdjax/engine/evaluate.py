"""Predictions and activations of a set of images, in equal, padded batches: one program per model and shape."""

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
    """Predict the classes of images in evaluation mode.

    Args:
      model: the classifier.
      variables: its variables.
      images: stored images [N, H, W, C].
      batch_size: largest number of images per batch.

    Returns:
      Predicted classes, int32 [N].
    """
    return np.zeros(0, np.int32) if len(images) == 0 else _batched(_classes(model), variables, (images,), batch_size)


def feature_map_names(model: Model, variables: Variables) -> tuple[str, ...]:
    """Return the names of the features that are maps [N, H, W, C], in forward order."""
    names: list[str] = []

    def run(variables: Variables, images: Any) -> None:
        features = model.apply(variables, images)[1]
        names.extend(name for name, value in features.items() if value.ndim == 4)

    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, *model.shape), jnp.float32))
    return tuple(names)


def activations(
    model: Model, variables: Variables, images: np.ndarray, chosen: dict[str, np.ndarray], batch_size: int = 100
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Compute activations of images in evaluation mode, as float32.

    Args:
      model: the classifier.
      variables: its variables.
      images: stored images [N, H, W, C].
      chosen: name of a feature -> int32 [k], the channels to return.
      batch_size: largest number of images per batch.

    Returns:
      (name of a feature -> [N, H', W', k], the penultimate feature, flattened to [N, D]).
    """
    return _batched(lambda v, part: _features(model)(v, part, chosen), variables, (images,), batch_size)


def activation_changes(
    model: Model, variables: Variables, clean: np.ndarray, triggered: np.ndarray, batch_size: int = 100
) -> dict[str, np.ndarray]:
    """Compute the trigger-activated change of every channel of every feature map (:func:`bdjax.metrics.tac`).

    Args:
      model: the classifier.
      variables: its variables.
      clean: stored images [N, H, W, C] without the trigger.
      triggered: the same images with the trigger.
      batch_size: largest number of images per batch.

    Returns:
      Name of a feature -> float32 [C].
    """
    of_image = _batched(_changes(model), variables, (clean, triggered), batch_size)
    return {name: values.mean(0, dtype=np.float64).astype(np.float32) for name, values in of_image.items()}


def _batched(step: Callable, variables: Variables, sets: tuple[np.ndarray, ...], batch_size: int) -> Any:
    """Apply `step(variables, *batches) -> pytree of [n, ...]` to all N > 0 images and concatenate the results."""
    total = len(sets[0])
    batch = -(-total // -(-total // batch_size))  # equal batches, so that one shape is compiled
    variables = jax.device_put(variables, jax.local_devices()[0])  # a pmapped step leaves some leaves on all devices
    results = []
    for start in range(0, total, batch):
        parts = [images[start : start + batch] for images in sets]
        short = batch - len(parts[0])
        if short:
            parts = [np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) for part in parts]
        out = step(variables, *parts)
        results.append(jax.tree.map(lambda value, count=batch - short: np.asarray(value)[:count], out))
    return jax.tree.map(lambda *values: np.concatenate(values), *results)


@lru_cache(maxsize=64)
def _classes(model: Model) -> Callable:
    return jax.jit(
        lambda variables, images: jnp.argmax(model.logits(variables, to_float(images)), -1).astype(jnp.int32)
    )


@lru_cache(maxsize=8)
def _features(model: Model) -> Callable:
    def run(variables: Variables, images: Any, chosen: Any) -> Any:
        features = model.apply(variables, to_float(images))[1]
        selected = {name: features[name][..., index].astype(jnp.float32) for name, index in chosen.items()}
        return selected, penultimate(features).astype(jnp.float32)

    return jax.jit(run)


@lru_cache(maxsize=8)
def _changes(model: Model) -> Callable:
    def run(variables: Variables, clean: Any, triggered: Any) -> dict[str, jax.Array]:
        before, after = (model.apply(variables, to_float(images))[1] for images in (clean, triggered))
        tac_per_image = jax.vmap(lambda a, b: tac(a[None], b[None]))
        return {name: tac_per_image(before[name], after[name]) for name in before if before[name].ndim == 4}

    return jax.jit(run)
