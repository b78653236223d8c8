"""Fine-tuning on clean images, some of which carry a recovered trigger with their true label."""

from collections.abc import Callable

import jax
import numpy as np

from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig
from bdjax.types import DefenderView, Key, Variables, Victim, to_float


def unlearn_triggers(
    victim: Victim, view: DefenderView, apply: Callable[[np.ndarray, np.ndarray], np.ndarray], count: int,
    share: float, recipe: FitConfig, key: Key, before: int = 0,
) -> Variables:  # fmt: skip
    """Fine-tune the victim on clean images, a share of which carries one of the recovered triggers.

    Args:
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the variables after each epoch.
      apply: `apply(images, index) -> images`: trigger number index[i] on image i, float32 [k, H, W, C] in [0, 1].
      count: number of triggers, which take turns.
      share: fraction of the images that carry a trigger; at least one image.
      recipe: the training recipe.
      key: draws the images that carry a trigger, and shuffles the images.
      before: number of rounds that were reported to the callback earlier.

    Returns:
      The trained variables.

    Raises:
      InputError: when there are fewer images than devices, or when the loss becomes NaN or infinite.
    """
    images, labels = np.array(to_float(view.images)), np.asarray(view.labels)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(labels)))
    chosen = order[: max(1, round(share * len(labels)))]
    images[chosen] = apply(images[chosen], np.arange(len(chosen)) % count)
    return tune(victim, images, labels, recipe, jax.random.fold_in(key, 1), view.callback, "unlearning", before=before)
