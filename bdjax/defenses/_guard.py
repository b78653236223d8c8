"""Check a defense on held-out images after every round, and return an earlier round when accuracy fell too far."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine import predict
from bdjax.engine.callbacks import ForwardingCallback
from bdjax.protocols import DefenseSpec
from bdjax.types import Callback, DefenderView, Key, Variables, Victim

FEWEST = 10
"""Smallest useful number of validation images; with fewer, the defense trains on all images without a check."""


def guarded(
    spec: DefenseSpec, config: Any, victim: Victim, view: DefenderView, key: Key, largest_drop: float
) -> Variables:
    """Run a defense, and return to the last round whose validation accuracy dropped by at most `largest_drop`.

    Args:
      spec: the defense; its `purify` is called.
      config: its Config.
      victim: the model to clean.
      view: the defender's data. The check uses its `validation` images; None disables the check.
      key: random key of the defense.
      largest_drop: largest allowed drop of accuracy from the victim's, as a fraction in [0, 1].

    Returns:
      The variables of the defense, of an earlier round, or of the victim. The callback receives `validation_accuracy`
      after each round, and `rolled_back_to` (0: the victim) when another round than the last is returned.
    """
    if view.validation is None:
        return spec.purify(config, victim, view, key)
    guard = _Guard(view.callback, victim, view.validation, largest_drop)
    purified = spec.purify(config, victim, replace(view, callback=guard), key)
    return guard.choose(purified)


def split_off(view: DefenderView, share: float, key: Key) -> DefenderView:
    """Move a stratified fraction of a view's images to its `validation` view.

    Args:
      view: the defender's data.
      share: fraction of the images to hold out, in (0, 1).
      key: random key of the draw.

    Returns:
      The view with a validation view; unchanged when this would hold fewer than `FEWEST` images.
    """
    if round(share * len(view.labels)) < FEWEST:
        return view
    training, validation = view.split(1 - share, key)
    return replace(training, validation=validation)


def accuracy(victim: Victim, variables: Variables, view: DefenderView) -> float:
    """Compute the accuracy of the victim's network on a view.

    Args:
      victim: supplies the network.
      variables: the variables to evaluate.
      view: images (stored [n, H, W, C]) and labels [n].

    Returns:
      Fraction of the images whose prediction equals the label, in [0, 1].
    """
    return float(np.mean(np.asarray(predict(victim.model, variables, view.images)) == view.labels))


class _Guard(ForwardingCallback):
    """A callback that stores the variables of the last round with sufficient accuracy."""

    def __init__(self, callback: Callback, victim: Victim, validation: DefenderView, largest_drop: float) -> None:
        super().__init__(callback)
        self._victim, self._validation = victim, validation
        self._lowest_accuracy = accuracy(victim, victim.variables, validation) - largest_drop
        self._stored, self._stored_round, self._round = victim.variables, 0, 0

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Measure the round's accuracy, store the round if it suffices, and forward the report."""
        self._round, round_accuracy = step, accuracy(self._victim, variables, self._validation)
        if round_accuracy >= self._lowest_accuracy:
            # the method donates its variables to the next step
            self._stored, self._stored_round = jax.tree.map(jnp.copy, variables), step
        super().on_round_end(step, variables, **{"validation_accuracy": jnp.float32(round_accuracy), **arrays})

    def choose(self, purified: Variables) -> Variables:
        """Return the defense's result if its accuracy suffices, else the stored round."""
        if accuracy(self._victim, purified, self._validation) >= self._lowest_accuracy:
            return purified
        self.on_estimate(None)
        super().on_round_end(self._round + 1, self._stored, rolled_back_to=jnp.int32(self._stored_round))
        return self._stored
