"""Fine-tuning on the defender's images by the engine, in batches of what there is."""

from dataclasses import replace
from typing import Any

import numpy as np

from bdjax.defenses._batch import batch_of
from bdjax.defenses._relay import Relay
from bdjax.engine import FitConfig, fit
from bdjax.types import Key, Variables, Victim, Watch


def tune(
    victim: Victim, images: Any, labels: np.ndarray, recipe: FitConfig, key: Key, watch: Watch, stage: str,
    before: int = 0,
) -> Variables:  # fmt: skip
    """Train the victim on by `recipe`, in training mode, and return its variables; the watch sees each epoch.

    Args:
      images: stored [n, H, W, C]; labels: [n]. The batch is cut to what there is and what the devices divide.
      before: how many steps the watch was shown already.

    Raises InputError for fewer images than devices, and for a loss that is not finite.
    """
    size = batch_of(recipe.batch_size, len(labels))
    return fit(
        victim.model, images, labels, replace(recipe, batch_size=size), key, start=victim.variables,
        watch=_Later(watch, before), stage=stage, part="defense",
    )  # fmt: skip


class _Later(Relay):
    """A watch that was shown some steps before."""

    def __init__(self, watch: Watch, before: int) -> None:
        super().__init__(watch)
        self._before = before

    def observe(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Pass the variables on, as of a later step."""
        super().observe(self._before + step, variables, **arrays)
