"""IBU: idealised unlearning with the true trigger, the reference for all unlearning methods.

Defined in BI-BAU, Eq. 49-50: Z. Zhu et al., "Rethinking Backdoor Adversarial Unlearning through the Lens of
Catastrophic Forgetting in Continual Learning", 2026, arXiv:2606.14078.

It is not a defense, because it requires the trigger. The model is fine-tuned on the clean images and on the same images
with the trigger and their true labels, in equal parts:

    mean CE(f(x), y) + mean CE(f(A(x)), y),     A the trigger at its test-time strength

Deviations:

- The paper's weights of the two terms are missing from the available text; they are 1 : 1 here.
- So are the constants of its recipe; the defaults are those of plain fine-tuning (SGD 0.01, momentum 0.9, weight decay
  5e-4, batches of 256).
- The trigger is put on every image once, before training.
"""

from dataclasses import dataclass

import jax
import numpy as np

from bdjax.defenses._trigger import triggered
from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim, to_float

NEEDS_TRIGGER = True


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the fine-tuning."""

    epochs: int = 20
    """Passes over clean and triggered images together."""
    batch_size: int = 256
    """Images per step, at most."""
    learning_rate: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 term that is added to the gradient."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("momentum", "weight_decay"), "zero or more", lambda v: v >= 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Fine-tune on clean images and on triggered ones with their true labels.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]), labels [n] and the trigger. Its callback receives the variables after
        each epoch.
      key: draws the trigger and the order of the images.

    Returns:
      The cleaned variables.

    Raises:
      InputError: when there is no trigger.
    """
    stamped = triggered("ibu", view, jax.random.fold_in(key, 0))
    images = np.concatenate([to_float(view.images), stamped])
    labels = np.concatenate([view.labels, view.labels])
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay
    )
    return tune(victim, images, labels, recipe, jax.random.fold_in(key, 1), view.callback, "idealised unlearning")
