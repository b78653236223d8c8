"""The edit of AGE and the detection by it, for the defense and the detector (:mod:`bdjax.defenses.age` explains it)."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.defenses._batch import shuffled_batches
from bdjax.engine import predict
from bdjax.metrics import anomaly_index, class_accuracy
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float


class Edit(NamedTuple):
    """Hyper-parameters of the edit."""

    share: float
    """Part of the network that is edited, counted from the output; in (0, 1]."""
    share_of: str
    """Unit of `share`: "layers" or "scalars"."""
    batch_size: int
    """Images per batch, at most."""
    scale: float
    """γ."""
    shift: float
    """λ."""
    epsilon: float
    """ε."""
    updated: bool
    """Whether the pass updates the BatchNorm statistics."""


def edit_weights(edit: Edit, victim: Victim, images: Any, key: Key) -> Variables:
    """Edit the later layers of a model by their mean activations.

    Args:
      edit: the hyper-parameters.
      victim: the model.
      images: stored [n, H, W, C].
      key: draws the batches.

    Returns:
      The edited variables.

    Raises:
      InputError: when the model does not provide the outputs of its layers.
    """
    static = _Static(edit.share, edit.share_of, edit.batch_size, edit.updated)
    hyper = {name: jnp.float32(getattr(edit, name)) for name in ("scale", "shift", "epsilon")}
    return _editor(victim.model, static)(victim.variables, jnp.asarray(images), jax.random.fold_in(key, 0), hyper)


def detect_by_edit(
    edit: Edit, threshold: float, collapse: float, victim: Victim, view: DefenderView, key: Key
) -> Scores:
    """Find the class that the edit makes the model forget.

    Args:
      edit: the hyper-parameters.
      threshold: anomaly index that the largest drop of a class's accuracy must exceed.
      collapse: less than this fraction of the class's accuracy must remain.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the batches.

    Returns:
      For each class the anomaly index of its drop in accuracy on these images.

    Raises:
      InputError: when the model does not provide the outputs of its layers.
    """
    edited, labels = edit_weights(edit, victim, view.images, key), jnp.asarray(view.labels)
    before, after = (
        class_accuracy(jnp.asarray(predict(victim.model, variables, view.images)), labels, victim.model.classes)
        for variables in (victim.variables, edited)
    )
    anomalies = np.asarray(anomaly_index(before - after))
    target = int(np.nanargmax(anomalies))
    poisoned = anomalies[target] > threshold and after[target] < collapse * before[target]
    return Scores(anomalies, target, float(anomalies[target]), bool(poisoned))


def factor(activation: jax.Array, shape: tuple[int, ...], scale: Any, shift: Any, epsilon: Any) -> jax.Array:
    """Compute the factors of a kernel from the mean activation of its layer.

    A dense layer (no K) may have been applied at many positions; they are averaged.

    Args:
      activation: float32 [*S, O], mean output of the layer.
      shape: shape of the kernel, [*K, I, O].
      scale: γ.
      shift: λ.
      epsilon: ε.

    Returns:
      The factors, float32 [*K, 1, O].
    """
    pooled, spatial = -activation.astype(jnp.float32), shape[:-2]
    if not spatial:
        pooled = pooled.reshape(-1, pooled.shape[-1]).mean(0)
    for axis, size in enumerate(spatial):
        matrix = models.pooling_matrix(pooled.shape[axis], size)
        pooled = jnp.moveaxis(jnp.tensordot(matrix, pooled, (1, axis)), 0, axis)
    centred = pooled - pooled.mean()
    return jnp.expand_dims(scale * centred / jnp.sqrt((centred**2).mean() + epsilon) + shift, -2)


class _Static(NamedTuple):
    """The hyper-parameters that the compiled program depends on."""

    share: float
    share_of: str
    batch_size: int
    updated: bool


@lru_cache(maxsize=16)
def _editor(model: Model, static: _Static) -> Callable:
    """Compile (variables, stored images, key, hyper) -> edited variables, as one program."""

    def edit(variables: Variables, images: jax.Array, key: Key, hyper: Any) -> Variables:
        batch_count = -(-len(images) // static.batch_size)
        batch_size = len(images) // batch_count
        order = shuffled_batches(key, len(images), batch_count, batch_size)
        kernels = models.kernels(variables["params"])

        def mean_outputs(stats: Any, index: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            current = {"params": variables["params"], "batch_stats": stats}
            outputs, stats = models.outputs(model, current, to_float(images[index]), static.updated)
            selected = later_layers([(path, kernels[path].size) for path in outputs], static.share, static.share_of)
            return stats, {path: outputs[path].astype(jnp.float32).mean(0) for path in selected}

        stats, means = jax.lax.scan(mean_outputs, variables["batch_stats"], order)  # no gradient: quick on a CPU, too
        changed = {
            path: kernels[path] * factor(mean.mean(0), kernels[path].shape, **hyper) for path, mean in means.items()
        }
        return {"params": models.with_kernels(variables["params"], changed), "batch_stats": stats}

    return jax.jit(edit)


def later_layers(layers: list[tuple[str, int]], share: float, share_of: str) -> list[str]:
    """Select the last layers, which make up a share of the network.

    Args:
      layers: (path, number of scalars in the kernel) in forward order.
      share: part of the network, in (0, 1].
      share_of: unit of the share, "layers" or "scalars".

    Returns:
      The paths of the selected layers, in forward order.
    """
    sizes = np.array([size if share_of == "scalars" else 1 for _, size in layers])
    cumulative_share = np.cumsum(sizes) / sizes.sum()
    return [path for (path, _), end in zip(layers, cumulative_share, strict=True) if end > 1 - share + 1e-9]
