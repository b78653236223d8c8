"""TABOR: Neural Cleanse with regularisers against patches that are large, scattered, blocking or overlaying.

W. Guo, L. Wang, X. Xing, M. Du and D. Song, "TABOR: A Highly Accurate Approach to Inspecting and Restoring Trojan
Backdoors in AI Systems", 2019, arXiv:1908.01763; with Y. Xu: "Towards Inspecting and Eliminating Trojan Backdoors in
Deep Neural Networks", ICDM 2020.

Threat model: the defender has the model and clean labelled images, but no trigger.

For every class t, a mask m [H, W, 1] and a pattern Δ [H, W, C], both parametrised as tanh(u) / (2 + 1e-7) + 0.5, solve

    min_{m, Δ} mean CE(f((1 - m) x + m Δ), t) + λ_t ‖m‖₁ + Σ λ_i R_i,      D = 255 (1 - m) Δ
    R1 = Σ m + Σ m² (λ1);  Σ D + Σ D² (λ2)          large patches, and patterns outside the mask
    R2 = Σ (neighbours' differences)² of m (λ3), of D (λ4)      scattered patches
    R3 = mean CE(f((1 - m) x), y) (λ5)              masks that hide the object
    R4 = CE(f(m Δ), t) (λ6)                         patches that need the image under them

λ_t follows the schedule of Neural Cleanse: multiplied by `multiplier` after `patience` consecutive epochs in which the
patch sends at least `threshold` of the images to t, and divided by `multiplier`^1.5 after as many in which it does not.
The smallest mask that reached the threshold is kept. A class is suspected when the anomaly index of its mask's norm
exceeds 2. Unlearning fine-tunes on the clean images, a share of which carries a recovered patch of a suspected class
with the true label; without a suspected class the model is returned unchanged.

Deviations:

- The authors published no code. The weights are those of the community's reimplementation and of TrojanZoo
  (1e-6, 1e-5, 1e-7, 1e-8, 0, 1e-2); the former has pixels in 0..255 (`pixel_scale`), the latter in 0..1.
- The loss, the schedule of λ_t and the choice of the smallest mask are TrojanZoo's, which adds the regularisers to
  Neural Cleanse, with BackdoorBench's constants of Neural Cleanse. The community's reimplementation has no λ_t, 200
  passes of Adam at 1e-3, and keeps the patch of the lowest loss.
- R3 and R4 are means over the batch; the community's reimplementation takes the label of its first image for both.
- The paper's metric of the recovered patches (size, smoothness and predictions together) is in neither
  reimplementation; the anomaly index of Neural Cleanse is used.
- The paper unlearns by fine-tuning on patched images; the constants are those of `neural_cleanse`.
- An epoch has at least eight steps, and a class for which no mask reached the threshold counts with the largest
  possible norm, H W (ours).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np

from bdjax.defenses._patch_unlearning import unlearn_triggers
from bdjax.defenses._tabor_search import RegularisedConfig, search
from bdjax.detectors._smallest_patches import patch_scores, stamp
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config(RegularisedConfig):
    """Hyper-parameters of the search, the regularisers, the detection and the unlearning."""

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
    """Search the smallest regularised patch of each class and unlearn the patches of the suspected classes.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the scores, then the variables, the
        suspected classes and the recovered patches.
      key: draws the first patches, shuffles the images and draws those that carry a patch.

    Returns:
      The cleaned variables; those of the victim when no class is suspected.

    Raises:
      InputError: when there are fewer images than devices, or when a loss becomes NaN or infinite.
    """
    patches = search(config, victim, view, jax.random.fold_in(key, 0))
    scores = patch_scores(config, patches)
    suspected_classes = np.flatnonzero(scores.classes > config.anomaly)
    view.callback.on_detection(scores)
    view.callback.on_round_end(1, victim.variables, suspected=suspected_classes, **patches.as_arrays())
    if len(suspected_classes) == 0:
        return victim.variables
    recipe = FitConfig(config.unlearning_epochs, config.batch_size, "sgd", config.learning_rate, 0.9)
    masks, patterns = patches.masks[suspected_classes], patches.patterns[suspected_classes]
    return unlearn_triggers(
        victim, view, lambda images, index: stamp(images, masks[index], patterns[index]), len(masks), config.stamped,
        recipe, jax.random.fold_in(key, 1), before=1,
    )  # fmt: skip
