"""The training recipe that defenses of dual encoders share."""

import math
from dataclasses import dataclass
from typing import Literal

from bdjax.engine.contrastive import PairFitConfig
from bdjax.errors import InputError, check_fields
from bdjax.pair_types import PairView


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning by AdamW on clean pairs."""

    epochs: int = 10
    """Passes over the clean pairs."""
    batch_size: int = 64
    """Pairs per step, at most the number of pairs."""
    learning_rate: float = 1e-5
    """Peak learning rate; for a small model that was trained from scratch about a tenth of its own."""
    warmup: int = 50
    """Steps of linear warm-up before the cosine decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and kernels."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "none"
    """Augmentation of the images."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("warmup",), "zero or more", lambda v: v >= 0),
            (("learning_rate",), "positive and finite", lambda v: 0 < v < math.inf),
            (("weight_decay",), "zero or more and finite", lambda v: 0 <= v < math.inf),
        )


def recipe(config: Recipe, view: PairView) -> PairFitConfig:
    """Return the recipe of a defense for the defender's pairs. Raises InputError when there are fewer than two."""
    if len(view.images) < 2:
        raise InputError(f"the defender has {len(view.images)} pair; a contrastive loss needs two. Give more pairs.")
    size = min(config.batch_size, len(view.images))
    return PairFitConfig(
        config.epochs, size, config.learning_rate, config.warmup, config.weight_decay, augment=config.augment
    )
