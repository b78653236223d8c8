"""RNP: unlearn the clean task, learn which channels recover it, and prune the others.

Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li and Y.-G. Jiang, "Reconstructive Neuron Pruning for Backdoor Defense",
ICML 2023, arXiv:2305.14876.

Threat model: the defender has the model and a few clean labelled images (1 % of the training set), and no trigger.

    1  Unlearn: from the victim θ_b, ascend CE(f_θ(x), y) on all weights until the training accuracy of an epoch is at
       most 0.2.
    2  Recover: with the unlearned weights frozen, min_{m in [0, 1]} α CE(m γ, β), masks m on the scales γ of batch
       normalisation.
    3  Prune: in θ_b, set γ_c = 0 where m_c <= τ.

The unlearned model has lost the clean task but not the backdoor; the channels whose masks step 2 reduces are those that
hinder the clean task. The training accuracy of an epoch is that of its batches, each measured before its step. Steps 1
and 2 run in training mode. Step 1 takes at most 21 epochs of SGD at 0.01 (momentum 0.9, weight decay 5e-4, learning
rate times 0.1 after 10 and after 20 epochs), step 2 20 epochs of SGD at 0.2.

Requires batch normalisation: every model in bdjax.models but mnist_cnn, vgg16, vgg19, vit and convnext.

Deviations:
- The release prints the test ASR for every τ and leaves the choice to the reader. Here τ is the largest threshold at
  which accuracy on validation images falls by at most `largest_drop` (our rule); every candidate is reported to the
  callback. Where even τ = 0 costs more than that, the victim is returned unchanged.
- Its gradient clipping is applied before gradients exist and has no effect; it is left out.
- Where training accuracy never falls to 0.2 the release has no checkpoint to continue from; here the last epoch is
  used.
- Images are cropped but not flipped (`augment=crop_flip` does both, as in the release). The last, smaller batch of an
  epoch is dropped.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from bdjax.defenses._batch import batch_of
from bdjax.defenses._epochs import Epoch, train_epochs
from bdjax.defenses._masks import (
    MaskOptimizer,
    SweepConfig,
    learn_masks,
    norm_scales,
    split_validation,
    sweep_thresholds,
)
from bdjax.defenses._pool import draw_batches
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config(SweepConfig):
    """Unlearning, recovering, and the choice of the threshold (the fields of SweepConfig)."""

    highest_threshold: float = 0.9
    """The largest τ that is tried, in [0, 1]."""
    epochs: int = 21
    """Epochs of unlearning, at most; the learning rate is multiplied by 0.1 after 10 and after 20."""
    stop_accuracy: float = 0.2
    """Unlearning ends after the first epoch whose training accuracy is at most this, in [0, 1]."""
    learning_rate: float = 0.01
    """Learning rate of SGD in unlearning."""
    momentum: float = 0.9
    """Momentum of SGD, in unlearning and on the masks, in [0, 1)."""
    weight_decay: float = 5e-4
    """Coefficient of the L2 term added to the gradient in unlearning."""
    batch_size: int = 128
    """Images per step; all of them when there are fewer."""
    alpha: float = 0.2
    """α, factor of the loss of the masks; positive."""
    mask_epochs: int = 20
    """Epochs of recovering."""
    mask_learning_rate: float = 0.2
    """Learning rate of SGD on the masks."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("epochs", "mask_epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("stop_accuracy",), "in [0, 1]", lambda v: 0 <= v <= 1),
            (("learning_rate", "mask_learning_rate", "alpha"), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("weight_decay",), "zero or more", lambda v: v >= 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn, recover, then prune as many channels as validation accuracy allows.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]; τ is chosen on its `validation` images, or on a fifth
        of the images where it has none (on all of them if there are fewer than 50). Its callback receives every
        candidate (see :func:`bdjax.defenses._masks.sweep_thresholds`).
      key: random key that draws the validation images, and shuffles and augments the others.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no batch normalisation, when the batch size or the number of images is smaller
        than the number of devices, or when the loss becomes NaN or infinite.
    """
    norm_scales("rnp", victim.model, victim.variables)
    view, validation = split_validation(view, jax.random.fold_in(key, 0))
    unlearned = unlearn(config, victim, view, jax.random.fold_in(key, 1))
    size = batch_of(config.batch_size, len(view.labels))
    steps = config.mask_epochs * (len(view.labels) // size)
    order = draw_batches(jax.random.fold_in(key, 2), len(view.labels), size, steps)
    masks = learn_masks(
        victim.model, unlearned.variables, view, order,
        MaskOptimizer(config.mask_learning_rate, config.momentum, config.alpha), 0, config.augment,
        jax.random.fold_in(key, 3), "recovering",
    )  # fmt: skip
    return sweep_thresholds(victim, masks, config, validation, view.callback)


def unlearn(config: Config, victim: Victim, view: DefenderView, key: Key) -> Epoch:
    """Ascend the cross-entropy until the training accuracy of an epoch is at most `stop_accuracy`.

    Args:
      config: hyper-parameters of the method.
      victim: the model to unlearn.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: random key that shuffles and augments the images.

    Returns:
      The first epoch whose training accuracy is at most `stop_accuracy`, or the last one where there is none.

    Raises:
      InputError: when the batch size or the number of images is smaller than the number of devices, or when the loss
        becomes NaN or infinite.
    """
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay,
        augment=config.augment,
    )  # fmt: skip

    def rate(epoch: int) -> float:
        return config.learning_rate * 0.1 ** ((epoch >= 10) + (epoch >= 20))

    ascent = train_epochs(
        victim, view.images, view.labels, recipe, key, view.callback, "unlearning", sign=-1.0, rates=rate
    )  # fmt: skip
    for epoch in ascent:
        if epoch.accuracy <= config.stop_accuracy:
            break
    return epoch
