"""Fine-tuning on clean images, some of which carry a recovered patch with their true label."""

import jax
import numpy as np

from bdjax.defenses._tuning import tune
from bdjax.detectors._smallest_patches import stamp
from bdjax.engine import FitConfig
from bdjax.types import DefenderView, Key, Variables, Victim, to_float


def unlearn_patches(
    victim: Victim, view: DefenderView, patches: tuple[np.ndarray, np.ndarray], share: float, recipe: FitConfig,
    key: Key, before: int = 0,
) -> Variables:  # fmt: skip
    """Fine-tune the victim on clean images, a share of which carries one of the patches.

    Args:
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the variables after each epoch.
      patches: masks, float32 [P, H, W, 1], and patterns, float32 [P, H, W, C], all in [0, 1]; they take turns.
      share: fraction of the images that carry a patch; at least one image.
      recipe: the training recipe.
      key: draws the images that carry a patch, and shuffles the images.
      before: number of rounds that were reported to the callback earlier.

    Returns:
      The trained variables.

    Raises:
      InputError: when there are fewer images than devices, or when the loss becomes NaN or infinite.
    """
    masks, patterns = patches
    images, labels = np.array(to_float(view.images)), np.asarray(view.labels)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(labels)))
    chosen = order[: max(1, round(share * len(labels)))]
    turn = np.arange(len(chosen)) % len(masks)
    images[chosen] = stamp(images[chosen], masks[turn], patterns[turn])
    return tune(victim, images, labels, recipe, jax.random.fold_in(key, 1), view.callback, "unlearning", before=before)
