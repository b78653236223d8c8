"""Automatic choice: try defenses in order of their cost, keep the first that a trigger-free test passes.

Threat model: the defender has the model and clean labelled images, no trigger and no target class.

Each method starts from the given model with its default settings. It passes if the estimate of the attack success rate
that is left (:mod:`bdjax.defenses._success`: triggers recovered from the model before and after, on images that the
defense did not learn from) is at most `highest_rate`, and accuracy on those images falls by at most `largest_drop`. If
none passes, the one of the lowest estimate among those whose accuracy held is returned; if none held, the model as it
was. The watch is told of every try. This selection is ours; it needs no knowledge of the attack.
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
    """Which methods are tried, and what passes."""

    methods: tuple[str, ...] = ("targeted_unlearning", "ibau", "bibau")
    """Defenses in the order of their cost."""
    highest_rate: float = 0.1
    """Estimate of the attack success rate that passes, in [0, 1]."""
    largest_drop: float = 0.03
    """Loss of accuracy on the validation images that passes, as a fraction in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self, "defense", (("highest_rate", "largest_drop"), "in [0, 1]", lambda v: 0 <= v <= 1))
        if not self.methods:
            raise InputError("defense.methods is empty. Name at least one defense, such as targeted_unlearning.")
        for name in self.methods:
            if name == "auto" or not hasattr(registry.load("defenses", name), "purify"):
                raise InputError(f"defense.methods has {name}, which cleans no model by itself. Leave it out.")


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """The first cleaned model that passes.

    Args:
      config: the methods and the bars; victim: the model; key: each method gets its own.
      view: clean images (stored [n, H, W, C]) and labels [n]; of its `validation` the tries are judged, or of a fifth
        of the images where there is none; of fewer than 50 images by those that are learnt from.

    Returns: the variables. The watch is shown each method's rounds, after each try its place in `methods` (`tried`),
      `estimated_rate` and `validation_accuracy`; at the end `chosen`, the place of the one returned, or -1 for none.
    """
    if view.validation is None:
        view = split_off(view, 0.2, jax.random.fold_in(key, 0))
    judged = view.validation or view
    right = accuracy(victim, victim.variables, judged)
    before, steps = None, _Steps(view.callback)
    best: tuple[float, Variables, int, _success.Estimate | None] = (math.inf, victim.variables, -1, None)
    watched = replace(view, callback=steps)
    for place, name in enumerate(config.methods):
        module = registry.load("defenses", name)
        cleaned = guarded(module, module.Config(), victim, watched, jax.random.fold_in(key, 1 + place), 0.1)
        if before is None:
            labels = steps.suspicious()
            if labels is None:
                labels = _success.suspicious(victim, view, jax.random.fold_in(key, 50))
            before = _success.recover(victim, labels, view, jax.random.fold_in(key, 51))
        found = _success.estimate(before, victim, cleaned, view, judged, jax.random.fold_in(key, 52 + place))
        held = accuracy(victim, cleaned, judged)
        steps.on_round_end(
            steps.last + 1, cleaned, tried=jnp.int32(place), estimated_rate=jnp.float32(found.rate),
            validation_accuracy=jnp.float32(held),
        )  # fmt: skip
        enough = held >= right - config.largest_drop
        if enough and found.rate < best[0]:
            best = found.rate, cleaned, place, found
        if enough and found.rate <= config.highest_rate:
            break
    _, chosen, place, left = best
    steps.on_round_end(steps.last + 1, chosen, chosen=jnp.int32(place))
    steps.on_estimate(left)
    return chosen


class _Steps(ForwardingCallback):
    """Numbers the rounds of all methods in a row, and keeps the first verdict."""

    def __init__(self, callback: Callback) -> None:
        super().__init__(callback)
        self.last = 0
        self._scores: Scores | None = None

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Pass it on as the next round."""
        self.last += 1
        super().on_round_end(self.last, variables, **arrays)

    def on_detection(self, scores: Scores) -> None:
        """Pass the first verdict on."""
        if self._scores is None:
            self._scores = scores
            super().on_detection(scores)

    def suspicious(self) -> Any:
        """The most suspicious classes of the first verdict, int32 [K]; None without one."""
        return None if self._scores is None else _success.most_suspicious(self._scores)
