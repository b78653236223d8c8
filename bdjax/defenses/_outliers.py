"""One-shot pruning of the channels whose measure is an outlier within their layer, shared by CLP, BNP and EP."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.defenses._masks import without
from bdjax.types import DefenderView, Model, Variables, Victim, to_float

_AT_ONCE = 100


def entering(model: Model, variables: Variables, images: Any, reduce: Callable) -> list[tuple[int, dict[str, Any]]]:
    """`reduce` of the input of each batch normalisation in evaluation mode, by layer, for each part of the images.

    Args: images: stored [n, H, W, C]; reduce: a module-level function of float32 [N, ..., C].
    Returns: (number of images, arrays by layer) for each part; all parts but the last have the same size.
    """
    size = min(_AT_ONCE, len(images))
    parts = [jnp.asarray(images[begin : begin + size]) for begin in range(0, len(images), size)]
    program = _program(model, reduce)
    return [(len(part), jax.tree.map(np.asarray, program(variables, part))) for part in parts]


@lru_cache(maxsize=16)
def _program(model: Model, reduce: Callable) -> Callable:
    return jax.jit(lambda variables, images: models.norm_inputs(model, variables, to_float(images), reduce))


def above(measure: np.ndarray, u: float) -> np.ndarray:
    """Where a layer's measure [C] exceeds mean + u std (sample standard deviation); NaN is ignored. bool [C]."""
    known = measure[np.isfinite(measure)]
    if len(known) < 2:
        return np.zeros(len(measure), bool)
    with np.errstate(invalid="ignore"):
        return measure > known.mean() + u * known.std(ddof=1)


def prune(
    victim: Victim, measures: Mapping[str, np.ndarray], u: float, view: DefenderView, biases: bool = False
) -> Variables:
    """The victim with the channels pruned whose measure, [C] by layer, is :func:`above`; shown to the watch.

    Args: biases: set β = 0, too.
    """
    gone = {layer: above(np.asarray(measure, np.float64), u) for layer, measure in measures.items()}
    variables = without(victim.variables, gone, biases)
    view.callback.on_progress("pruning", 1, 1)
    view.callback.on_round_end(1, variables, pruned=jnp.int32(sum(int(one.sum()) for one in gone.values())))
    return variables
