"""Channels that stand out of their layer, pruned in one go: what CLP, BNP and EP do with their measures."""

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
    """`reduce` of what enters each batch normalisation in evaluation mode, by layer, part after part of the images.

    Args: images: stored [n, H, W, C]; reduce: a function of a module, of float32 [N, ..., C].
    Returns: (images, arrays by layer) of each part; all parts are of one size but the last.
    """
    size = min(_AT_ONCE, len(images))
    parts = [jnp.asarray(images[begin : begin + size]) for begin in range(0, len(images), size)]
    program = _program(model, reduce)
    return [(len(part), jax.tree.map(np.asarray, program(variables, part))) for part in parts]


@lru_cache(maxsize=16)
def _program(model: Model, reduce: Callable) -> Callable:
    return jax.jit(lambda variables, images: models.entering(model, variables, to_float(images), reduce))


def above(measure: np.ndarray, u: float) -> np.ndarray:
    """Where a layer's measure [C] exceeds mean + u std (the sample's, C - 1); NaN counts for nothing. bool [C]."""
    known = measure[np.isfinite(measure)]
    if len(known) < 2:
        return np.zeros(len(measure), bool)
    with np.errstate(invalid="ignore"):
        return measure > known.mean() + u * known.std(ddof=1)


def prune(
    victim: Victim, measures: Mapping[str, np.ndarray], u: float, view: DefenderView, biases: bool = False
) -> Variables:
    """The victim without the channels whose measure [C], by layer, is :func:`above`; shown to the watch.

    Args: biases: β = 0, too, not γ alone.
    """
    gone = {layer: above(np.asarray(measure, np.float64), u) for layer, measure in measures.items()}
    variables = without(victim.variables, gone, biases)
    view.watch.observe(1, variables, pruned=jnp.int32(sum(int(one.sum()) for one in gone.values())))
    return variables
