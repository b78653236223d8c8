"""One-shot pruning of the channels whose measure is an outlier within their layer, shared by CLP, BNP and EP."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.defenses._masks import prune_channels
from bdjax.types import DefenderView, Model, Variables, Victim, to_float

_BATCH = 100
"""Images per forward pass."""


def reduce_norm_inputs(
    model: Model, variables: Variables, images: Any, reduce: Callable
) -> list[tuple[int, dict[str, Any]]]:
    """Reduce the input of every batch normalisation in evaluation mode, batch by batch.

    Args:
      model: the classifier.
      variables: variables of the model.
      images: stored [n, H, W, C].
      reduce: a module-level function of an input, float32 [N, ..., C].

    Returns:
      (number of images, results of `reduce` by layer) for each batch; all batches but the last have the same size.
    """
    size = min(_BATCH, len(images))
    batches = [jnp.asarray(images[start : start + size]) for start in range(0, len(images), size)]
    program = _compiled(model, reduce)
    return [(len(batch), jax.tree.map(np.asarray, program(variables, batch))) for batch in batches]


@lru_cache(maxsize=16)
def _compiled(model: Model, reduce: Callable) -> Callable:
    """Return the compiled function (variables, stored images) -> results of `reduce` by layer."""
    return jax.jit(lambda variables, images: models.norm_inputs(model, variables, to_float(images), reduce))


def is_outlier(measure: np.ndarray, u: float) -> np.ndarray:
    """Return where a layer's measure exceeds mean + u std, with the sample standard deviation; NaN is ignored.

    Args:
      measure: float [C].
      u: number of standard deviations.

    Returns:
      bool [C]; all False where fewer than two values are finite.
    """
    finite = measure[np.isfinite(measure)]
    if len(finite) < 2:
        return np.zeros(len(measure), bool)
    with np.errstate(invalid="ignore"):
        return measure > finite.mean() + u * finite.std(ddof=1)


def prune_outliers(
    victim: Victim, measures: Mapping[str, np.ndarray], u: float, view: DefenderView, biases: bool = False
) -> Variables:
    """Prune the channels of the victim whose measure is an outlier (see :func:`is_outlier`).

    Args:
      victim: the model to prune.
      measures: a measure of each channel, [C] by layer.
      u: number of standard deviations above the layer's mean beyond which a channel is pruned.
      view: its callback receives the variables with the number of channels `pruned`.
      biases: whether β = 0 is set as well as γ = 0.

    Returns:
      The pruned variables.
    """
    outliers = {layer: is_outlier(np.asarray(measure, np.float64), u) for layer, measure in measures.items()}
    variables = prune_channels(victim.variables, outliers, biases)
    view.callback.on_progress("pruning", 1, 1)
    view.callback.on_round_end(1, variables, pruned=jnp.int32(sum(int(mask.sum()) for mask in outliers.values())))
    return variables
