"""Zero-shot classification: accuracy by captions of the classes, and the attack success rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bdjax.engine import embed
from bdjax.errors import InputError
from bdjax.pair_types import DualEncoder, LabelledImages, TriggerFunction
from bdjax.types import Arrays, Key, Variables, quantise, to_float
from bdjax.vision_language import prompts
from bdjax.vision_language.attacks import _patches
from bdjax.vision_language.tokenizer import Tokenizer

_BATCH = 250


@dataclass(frozen=True)
class ZeroShotResult:
    """Measurements of a dual encoder as a classifier."""

    top1: float
    """Share of the clean images whose most similar class is right, in [0, 1]."""
    top5: float
    """Share of the clean images whose right class is among the five most similar."""
    n: int
    """Number of clean images."""
    asr: float | None = None
    """Share of the triggered images of other classes that are assigned to the target; None: no trigger was given."""
    n_triggered: int = 0
    """Number of triggered images."""
    chance: float = 0.0
    """Accuracy of guessing."""


def class_tokens(tokenize: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Return the captions of classes.

    Args:
      tokenize: the model's tokenizer.
      classes: names of C classes.
      templates: T captions with {} in place of the name.

    Returns:
      int32 [C, T, L].
    """
    captions = [prompts.fill(template, name) for name in classes for template in templates]
    return tokenize(captions).reshape(len(classes), len(templates), tokenize.context)


def target_number(classes: Sequence[str], target: str) -> int:
    """Return the number of the class with a name. Raises InputError when there is none."""
    names = [name.replace("_", " ").lower() for name in classes]
    if target.replace("_", " ").lower() not in names:
        raise InputError(f"the target {target!r} is no class; there are {', '.join(map(str, classes[:8]))} ...")
    return names.index(target.replace("_", " ").lower())


def put_triggers(trigger: TriggerFunction, config: Any, images: np.ndarray, key: Key, arrays: Arrays) -> np.ndarray:
    """Put a trigger on stored images.

    Args:
      trigger: the trigger's function.
      config: Config of the attack.
      images: stored [N, H, W, C].
      key: random key.
      arrays: arrays of the trigger.

    Returns:
      uint8 [N, H, W, C].
    """
    apply, parts = _patches.triggered(trigger, config), []
    for start in range(0, len(images), _BATCH):
        positions = np.minimum(np.arange(start, start + _BATCH), len(images) - 1)
        batch = apply(to_float(images[positions]), jax.random.fold_in(key, start), dict(arrays))
        parts.append(np.asarray(quantise(batch)))
    return np.concatenate(parts)[: len(images)]


def evaluate(
    encoder: DualEncoder, variables: Variables, test: LabelledImages, tokens: np.ndarray, *,
    triggered: np.ndarray | None = None, target: int = -1,
) -> ZeroShotResult:  # fmt: skip
    """Measure a dual encoder.

    Args:
      encoder: the dual encoder.
      variables: its variables.
      test: clean images.
      tokens: captions of the classes, int32 [C, T, L] (:func:`class_tokens`).
      triggered: the same images with the trigger, stored; None: the attack success rate is not measured.
      target: number of the target's class; its own images are not counted.

    Returns:
      The measurements.
    """
    if test.images.shape[1:] != encoder.shape:
        raise InputError(f"the test images are {test.images.shape[1:]}, the model takes {encoder.shape}.")
    classes = embed.class_embeddings(encoder, variables, tokens)
    ranks = embed.rank_classes(embed.embed_images(encoder, variables, test.images), classes)
    hits = ranks == test.labels[:, None]
    asr, others = None, test.labels != target
    if triggered is not None:
        chosen = embed.rank_classes(embed.embed_images(encoder, variables, triggered[others]), classes, 1)[:, 0]
        asr = float((chosen == target).mean())
    return ZeroShotResult(
        float(hits[:, 0].mean()), float(hits.any(1).mean()), len(hits), asr,
        int(others.sum()) if triggered is not None else 0, 1 / len(classes),
    )  # fmt: skip
