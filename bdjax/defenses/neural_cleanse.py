"""Neural Cleanse: detect a backdoor by the smallest patch that sends images to each class, then unlearn that patch.

B. Wang, Y. Yao, S. Shan, H. Li, B. Viswanath, H. Zheng and B. Y. Zhao, "Neural Cleanse: Identifying and Mitigating
Backdoor Attacks in Neural Networks", IEEE Symposium on Security and Privacy 2019.

Threat model: the defender has the model and clean labelled images, but no trigger.

For every class t, a mask m [H, W, 1] and a pattern p [H, W, C], both parametrised as tanh(u) / (2 + 1e-7) + 0.5, solve

    min_{m, p} mean CE(f((1 - m) x + m p), t) + λ_t ‖m‖₁

λ_t starts at `cost`. It is multiplied by `multiplier` after `patience` consecutive epochs in which the patch sends at
least `threshold` of the images to t, and divided by `multiplier`^1.5 after as many epochs in which it does not. The
search returns the smallest mask that reached the threshold. A class is suspected when the anomaly index of its mask's
norm (the distance below the median in units of 1.4826 median absolute deviations) exceeds 2.

All classes are searched in one program: they share the victim's weights, so their images form one batch, and the
gradients of different classes are independent. Unlearning fine-tunes on the clean images, a share of which carries a
recovered patch of a suspected class with the true label. Without a suspected class the model is returned unchanged.

Deviations:

- The constants are BackdoorBench's. The original has threshold 0.99 and one epoch of unlearning on 10 % of the
  training set.
- There is no early stopping, because all classes run together.
- An epoch has at least eight steps, so that a few hundred images are enough (ours).
- A class for which no mask reached the threshold counts with the largest possible norm, H W (ours).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np

from bdjax.defenses._tuning import tune
from bdjax.detectors._smallest_patches import SearchConfig, patch_scores, search, stamp
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim, to_float


@dataclass(frozen=True)
class Config(SearchConfig):
    """Hyper-parameters of the search, the detection and the unlearning."""

    part: ClassVar[str] = "defense"
    """How the fields are called in messages."""
    unlearning_epochs: int = 10
    """Epochs of the fine-tuning."""
    stamped: float = 0.2
    """Fraction of the images that carry a recovered patch in the fine-tuning, in (0, 1]."""
    learning_rate: float = 0.01
    """Learning rate of the fine-tuning, SGD with momentum 0.9."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            self.part,
            (("unlearning_epochs",), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("stamped",), "in (0, 1]", lambda v: 0 < v <= 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Search the smallest patch of each class and unlearn the patches of the suspected classes.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the scores, then the variables, the
        suspected classes and the recovered patches.
      key: shuffles the images and draws those that carry a patch.

    Returns:
      The cleaned variables; those of the victim when no class is suspected.
    """
    patches = search(config, victim, view, jax.random.fold_in(key, 0))
    scores = patch_scores(config, patches)
    suspected_classes = np.flatnonzero(scores.classes > config.anomaly)
    view.callback.on_detection(scores)
    view.callback.on_round_end(1, victim.variables, suspected=suspected_classes, **patches.as_arrays())
    if len(suspected_classes) == 0:
        return victim.variables
    images, labels = np.array(to_float(view.images)), np.asarray(view.labels)
    shuffled = np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), len(labels)))
    stamped_images = shuffled[: max(1, round(config.stamped * len(labels)))]
    stamped_classes = suspected_classes[np.arange(len(stamped_images)) % len(suspected_classes)]
    images[stamped_images] = stamp(
        images[stamped_images], patches.masks[stamped_classes], patches.patterns[stamped_classes]
    )
    recipe = FitConfig(config.unlearning_epochs, config.batch_size, "sgd", config.learning_rate, 0.9)
    return tune(victim, images, labels, recipe, jax.random.fold_in(key, 2), view.callback, "unlearning", before=1)
