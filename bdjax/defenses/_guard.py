"""Accuracy on images that a defense does not learn from, after every round; an earlier round where it fell too far."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine import predict
from bdjax.engine.callbacks import ForwardingCallback
from bdjax.types import Callback, DefenderView, Key, Variables, Victim

FEWEST = 10
"""Fewer validation images say too little about accuracy: then the defense learns from all images, unguarded."""


def guarded(
    module: ModuleType, config: Any, victim: Victim, view: DefenderView, key: Key, largest_drop: float
) -> Variables:
    """Purify, and go back to the last round before accuracy on the validation images fell by more than `largest_drop`.

    Args:
      module, config: the defense; victim: the model; key: the defense's.
      view: what it learns from; its `validation` is what it is judged by. None: nothing is judged.
      largest_drop: loss of accuracy, as a fraction.

    Returns: the variables of the defense, of an earlier round, or of the victim. The watch is shown
      `validation_accuracy` after each round, and `rolled_back_to` (0: the victim) where another round is returned.
    """
    if view.validation is None:
        return module.purify(config, victim, view, key)
    guard = _Guard(view.callback, victim, view.validation, largest_drop)
    cleaned = module.purify(config, victim, replace(view, callback=guard), key)
    return guard.choose(cleaned)


def split_off(view: DefenderView, share: float, key: Key) -> DefenderView:
    """The view with a stratified `share` of its images kept apart as its `validation`; itself where those are few."""
    if round(share * len(view.labels)) < FEWEST:
        return view
    learning, validation = view.split(1 - share, key)
    return replace(learning, validation=validation)


def accuracy(victim: Victim, variables: Variables, view: DefenderView) -> float:
    """Share of the view's images that the model calls by their labels."""
    return float(np.mean(np.asarray(predict(victim.model, variables, view.images)) == view.labels))


class _Guard(ForwardingCallback):
    """A watch that keeps the variables of the last round whose accuracy holds."""

    def __init__(self, callback: Callback, victim: Victim, validation: DefenderView, largest_drop: float) -> None:
        super().__init__(callback)
        self._victim, self._validation = victim, validation
        self._lowest = accuracy(victim, victim.variables, validation) - largest_drop
        self._kept, self._kept_round, self._round = victim.variables, 0, 0

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Judge the round, and pass it on."""
        self._round, right = step, accuracy(self._victim, variables, self._validation)
        if right >= self._lowest:
            # the method donates its variables to the next step
            self._kept, self._kept_round = jax.tree.map(jnp.copy, variables), step
        super().on_round_end(step, variables, **{"validation_accuracy": jnp.float32(right), **arrays})

    def choose(self, cleaned: Variables) -> Variables:
        """What the defense returned if its accuracy holds, else what was kept."""
        if accuracy(self._victim, cleaned, self._validation) >= self._lowest:
            return cleaned
        self.on_estimate(None)
        super().on_round_end(self._round + 1, self._kept, rolled_back_to=jnp.int32(self._kept_round))
        return self._kept
