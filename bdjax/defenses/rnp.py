"""RNP: unlearn the clean task, see which channels must go to recover it, prune those (Li et al., ICML 2023).

Of "Reconstructive Neuron Pruning". Threat model: the defender has the model and a few clean labelled images (1 % of the
training set), no trigger.

    1  ascend CE(f_θ(x), y) from θ_b, all weights, until an epoch's training accuracy is at most 0.2
    2  with the unlearned weights frozen: min_{m in [0, 1]} α CE(m γ, β), m on the scales of batch normalisation
    3  γ_c = 0 in θ_b    where m_c <= τ

What is left after 1 knows the backdoor better than the task; channels that 2 turns off stand in the way of the task.
The accuracy of an epoch is that of its batches, each before its step. 1 and 2 are in training mode. At most 21 epochs
of SGD 0.01 (momentum 0.9, weight decay 5e-4, which shrinks weights while the loss ascends; times 0.1 after 10 and 20),
then 20 epochs of the masks at 0.2. Where accuracy never falls that far, the last epoch is taken.

Works on every model with batch normalisation: cnn, small_vgg, resnet18, preact_resnet18, vgg16_bn, mobilenet_v2 and all
others but mnist_cnn, vgg16, vgg19, vit and convnext.

Deviations: the release prints the test ASR at every τ and leaves the choice to who reads it. Here τ is the largest at
which accuracy on validation images falls by at most `largest_drop` (ours); the watch is shown every τ. Its gradient
clipping comes before the gradients and does nothing: it is left out. Where accuracy never falls to 0.2 it has no file
to go on from. Images are cropped, not flipped (`augment=crop_flip` is the release's). A last, smaller batch of an
epoch is left out.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.defenses._batch import batch_of
from bdjax.defenses._epochs import Epoch, epochs
from bdjax.defenses._masks import Masking, SweepConfig, learnt, parted, scales, swept
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config(SweepConfig):
    """How the task is unlearned and recovered, and which channels go (the fields of SweepConfig)."""

    highest_threshold: float = 0.9
    """The last τ that is tried, in [0, 1]."""
    epochs: int = 21
    """Of unlearning, at most; times 0.1 in rate after 10 and after 20."""
    stop_accuracy: float = 0.2
    """Training accuracy of an epoch at which unlearning ends, a fraction in [0, 1]."""
    learning_rate: float = 0.01
    """Of unlearning's SGD."""
    momentum: float = 0.9
    """Of both, in [0, 1)."""
    weight_decay: float = 5e-4
    """Of unlearning: L2 term added to the gradient."""
    batch_size: int = 128
    """Images a step; all of them when there are fewer."""
    alpha: float = 0.2
    """α, what the masks' loss is multiplied by; positive."""
    mask_epochs: int = 20
    """Of recovering."""
    mask_learning_rate: float = 0.2
    """Of the masks' SGD."""
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
    """Unlearn, recover, then prune as many channels as accuracy allows.

    Args:
      view: clean images (stored [n, H, W, C]) and labels [n]; τ is chosen on its `validation`, or on a fifth of the
        images where there is none, of fewer than 50 on all. key: shuffles and augments, and draws that fifth.
    Returns: the variables; the watch is shown the candidates (see :func:`bdjax.defenses._masks.swept`).
    Raises InputError for a model without batch normalisation, and for a loss that is not finite.
    """
    scales("rnp", victim.model, victim.variables)
    view, judged = parted(view, jax.random.fold_in(key, 0))
    last = unlearned(config, victim, view, jax.random.fold_in(key, 1))
    size = batch_of(config.batch_size, len(view.labels))
    number, own = len(view.labels) // size, jax.random.fold_in(key, 2)
    order = jnp.concatenate([
        jax.random.permutation(jax.random.fold_in(own, epoch), len(view.labels))[: number * size].reshape(number, size)
        for epoch in range(config.mask_epochs)
    ])  # fmt: skip
    masks = learnt(
        victim.model, last.variables, view, order,
        Masking(config.mask_learning_rate, config.momentum, config.alpha), 0, config.augment,
        jax.random.fold_in(key, 3), "recovering",
    )  # fmt: skip
    return swept(victim, masks, config, judged, view.watch)


def unlearned(config: Config, victim: Victim, view: DefenderView, key: Key) -> Epoch:
    """The first epoch of ascent whose accuracy is at most `stop_accuracy`, or the last one."""
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay,
        augment=config.augment,
    )  # fmt: skip

    def rate(epoch: int) -> float:
        return config.learning_rate * 0.1 ** ((epoch >= 10) + (epoch >= 20))

    ascent = epochs(
        victim, view.images, view.labels, recipe, key, view.watch, "unlearning", sign=-1.0, rates=rate
    )  # fmt: skip
    for last in ascent:
        if last.accuracy <= config.stop_accuracy:
            break
    return last
