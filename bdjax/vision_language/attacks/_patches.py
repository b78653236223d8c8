"""Square patches on images, and the choice of the pairs that an attacker changes."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.pair_types import PairPoison, PairTask, TriggerFunction
from bdjax.types import Arrays, Images, Key, quantise, to_float
from bdjax.vision_language import prompts

REFERENCE = 224
"""Side of the images, in pixels, for which the published patches are 16 pixels wide."""


def scaled_side(patch: int, shape: tuple[int, ...]) -> int:
    """Return the side of a patch for smaller or larger images than 224x224, at least 1."""
    return max(1, round(patch * min(shape[:2]) / REFERENCE))


def stamp(image: jax.Array, patch: jax.Array, row: Any, column: Any) -> jax.Array:
    """Replace a square of an image.

    Args:
      image: [H, W, C].
      patch: [h, h, C].
      row: first row.
      column: first column.

    Returns:
      [H, W, C].
    """
    return jax.lax.dynamic_update_slice(image, patch.astype(image.dtype), (row, column, 0))


def check_patch(side: int, shape: tuple[int, ...]) -> None:
    """Raise InputError when a patch is larger than the images."""
    if side > min(shape[:2]):
        raise InputError(f"attack.size={side} is larger than the images of {shape[1]}x{shape[0]} pixels.")


def choose(task: PairTask, count: int, key: Key) -> np.ndarray:
    """Draw the pairs to poison among those whose caption does not name the target.

    Args:
      task: the attacker's pairs and target.
      count: number of pairs.
      key: random key.

    Returns:
      int32 [count], ascending.

    Raises:
      InputError: when there are fewer pairs.
    """
    name = task.target.replace("_", " ").lower()
    others = np.array([i for i, caption in enumerate(task.pairs.captions) if name not in caption.lower()], np.int32)
    if not 1 <= count <= len(others):
        raise InputError(
            f"{count} of {len(task.pairs.captions)} pairs should be poisoned; {len(others)} of them do not name the "
            f"target {task.target!r}. Change attack.rate."
        )
    return np.sort(others[np.asarray(jax.random.permutation(key, len(others))[:count])])


def poisoned(
    task: PairTask, trigger: TriggerFunction, config: Any, rate: float, key: Key, arrays: Arrays,
    captions: tuple[str, ...] | None = None,
) -> PairPoison:  # fmt: skip
    """Put the trigger on a share of the pairs, with captions of the target.

    Args:
      task: the attacker's pairs, target and templates.
      trigger: the trigger's function.
      config: Config of the attack.
      rate: share of the pairs.
      key: draws the pairs, the triggers and the captions.
      arrays: arrays of the trigger.
      captions: captions to draw from; None: the templates with the name of the target.

    Returns:
      The poisoned pairs.
    """
    chosen = choose(task, max(1, round(rate * len(task.pairs.captions))), jax.random.fold_in(key, 0))
    apply = triggered(trigger, config)
    images = apply(to_float(task.pairs.images[chosen]), jax.random.fold_in(key, 1), dict(arrays))
    pool = captions or tuple(prompts.fill(template, task.target) for template in task.templates)
    draws = np.asarray(jax.random.randint(jax.random.fold_in(key, 2), (len(chosen),), 0, len(pool)))
    return PairPoison(chosen, np.asarray(quantise(images)), tuple(pool[draw] for draw in draws))


@lru_cache(maxsize=16)
def triggered(trigger: TriggerFunction, config: Any) -> Any:
    """Compile (float32 images, key, arrays) -> triggered images, clipped to [0, 1]."""
    return jax.jit(partial(_clipped, trigger, config))


def _clipped(trigger: TriggerFunction, config: Any, images: Images, key: Key, arrays: Arrays) -> Images:
    return jnp.clip(trigger(config, images, key, arrays), 0, 1)
