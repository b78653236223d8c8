"""Automatic choice: try defenses in order of their cost and return the first result that a trigger-free test accepts.

This selection is ours; it needs no knowledge of the attack.

Threat model: the defender has the model and clean labelled images, but no trigger and no target class.

Each method starts from the given model with its default settings. Its result is accepted if the estimate of the
remaining attack success rate (:mod:`bdjax.defenses._success`: triggers recovered from the model before and after, on
images that the defense did not train on) is at most `highest_rate`, and accuracy on those images falls by at most
`largest_drop`. If no result is accepted, the one with the lowest estimate is returned among those with sufficient
accuracy; if there is none, the given model. The callback receives a report of every attempt.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from bdjax import registry
from bdjax.defenses import _success
from bdjax.defenses._guard import accuracy, guarded, split_off
from bdjax.engine.callbacks import ForwardingCallback
from bdjax.errors import InputError, check_fields
from bdjax.types import Callback, DefenderView, Key, Scores, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The methods and the acceptance criteria."""

    methods: tuple[str, ...] = ("targeted_unlearning", "ibau", "bibau")
    """Defenses in the order in which they are tried, cheapest first."""
    highest_rate: float = 0.1
    """Largest acceptable estimate of the remaining attack success rate, in [0, 1]."""
    largest_drop: float = 0.03
    """Largest acceptable loss of accuracy on the validation images, as a fraction in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self, "defense", (("highest_rate", "largest_drop"), "in [0, 1]", lambda v: 0 <= v <= 1))
        if not self.methods:
            raise InputError("defense.methods is empty. Name at least one defense, such as targeted_unlearning.")
        for name in self.methods:
            if name == "auto":
                raise InputError(f"defense.methods has {name}, which cleans no model by itself. Leave it out.")
            registry.load("defenses", name)  # refuses an unknown method, and one that only detects


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Return the first purified model that meets the criteria.

    Args:
      config: the methods and the criteria.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. The results are tested on its `validation` images;
        without them, on a fifth of the images; with fewer than 50 images, on those that the methods train on. Its
        callback receives the rounds of each method, after each attempt its position in `methods` (`tried`),
        `estimated_rate` and `validation_accuracy`, and at the end `chosen`, the position of the returned method, or -1
        for none.
      key: every method gets its own key derived from it.

    Returns:
      The variables.
    """
    if view.validation is None:
        view = split_off(view, 0.2, jax.random.fold_in(key, 0))
    held_out = view.validation or view
    victim_accuracy = accuracy(victim, victim.variables, held_out)
    recovered, rounds = None, _RoundCounter(view.callback)
    best: tuple[float, Variables, int, _success.Estimate | None] = (math.inf, victim.variables, -1, None)
    observed_view = replace(view, callback=rounds)
    for position, name in enumerate(config.methods):
        defense = registry.load("defenses", name)
        purified = guarded(defense, defense.Config(), victim, observed_view, jax.random.fold_in(key, 1 + position), 0.1)
        if recovered is None:
            labels = rounds.suspicious()
            if labels is None:
                labels = _success.suspicious(victim, view, jax.random.fold_in(key, 50))
            recovered = _success.recover(victim, labels, view, jax.random.fold_in(key, 51))
        estimate = _success.estimate(
            recovered, victim, purified, view, held_out, jax.random.fold_in(key, 52 + position)
        )
        purified_accuracy = accuracy(victim, purified, held_out)
        rounds.on_round_end(
            rounds.last + 1, purified, tried=jnp.int32(position), estimated_rate=jnp.float32(estimate.rate),
            validation_accuracy=jnp.float32(purified_accuracy),
        )  # fmt: skip
        is_accurate = purified_accuracy >= victim_accuracy - config.largest_drop
        if is_accurate and estimate.rate < best[0]:
            best = estimate.rate, purified, position, estimate
        if is_accurate and estimate.rate <= config.highest_rate:
            break
    _, variables, position, remaining_estimate = best
    rounds.on_round_end(rounds.last + 1, variables, chosen=jnp.int32(position))
    rounds.on_estimate(remaining_estimate)
    return variables


class _RoundCounter(ForwardingCallback):
    """A callback that numbers the rounds of all methods consecutively and keeps the first detection."""

    def __init__(self, callback: Callback) -> None:
        super().__init__(callback)
        self.last = 0
        self._scores: Scores | None = None

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Forward the report with the next number."""
        self.last += 1
        super().on_round_end(self.last, variables, **arrays)

    def on_detection(self, scores: Scores) -> None:
        """Forward the first detection."""
        if self._scores is None:
            self._scores = scores
            super().on_detection(scores)

    def suspicious(self) -> Any:
        """Return the goals chosen from the first detection, int32 [K]; None without one."""
        return None if self._scores is None else _success.most_suspicious(self._scores)
