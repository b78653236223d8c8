"""Channels that stand out of their layer, pruned in one go: what CLP, BNP and EP do with their measures."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from bdjax.defenses._masks import without
from bdjax.types import DefenderView, Variables, Victim


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
