"""ANP: prune the channels whose perturbation turns predictions most (Wu and Wang, NeurIPS 2021).

Threat model: the defender has the model and a few clean labelled images (1 % of the training set), no trigger.

Masks m in [0, 1] on the scale γ of every batch normalisation, perturbed with its bias β:

    min_m  α CE(m γ, β) + (1 - α) max_{|ξ|, |δ| <= ε} CE((m + ξ) γ, (1 + δ) β)
    γ_c = 0 in the victim    where m_c <= τ

Each step draws images with replacement, then ξ and δ from U[-ε, ε], moves them by one signed step of ε (not projected,
so that they reach 2 ε), and takes one step of SGD on m, in training mode: with the batch's own statistics. Nothing but
the masks leaves this; the victim keeps its weights and its running statistics, and β of a pruned channel.

Works on every model with batch normalisation: cnn, small_vgg, resnet18, preact_resnet18, vgg16_bn, mobilenet_v2 and all
others but mnist_cnn, vgg16, vgg19, vit and convnext. Three forward and backward passes a step, of 2,000 steps.

Deviations: the release prints the test ASR at every τ and leaves the choice to who reads it, BackdoorBench keeps the τ
of the lowest test ASR. Here τ is the largest at which accuracy on validation images falls by at most `largest_drop`
(ours); the watch is shown every τ. Images are cropped, not flipped (`augment=crop_flip` is the release's). All of the
defender's images are drawn from, where the release takes 500. BackdoorBench's rate is 0.01, at which masks hardly move.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from bdjax.defenses._batch import batch_of
from bdjax.defenses._masks import Masking, SweepConfig, learnt, parted, scales, swept
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config(SweepConfig):
    """How masks are trained, and which channels go (the fields of SweepConfig)."""

    epsilon: float = 0.4
    """ε, bound of the perturbation relative to scale and bias; 0: none."""
    noise_steps: int = 1
    """Signed steps of the perturbation, of ε / `noise_steps` each."""
    alpha: float = 0.2
    """α, weight of the loss without perturbation, in [0, 1]."""
    iterations: int = 2000
    """Steps of the masks."""
    batch_size: int = 128
    """Images a step, drawn with replacement."""
    learning_rate: float = 0.2
    """Of the masks' SGD."""
    momentum: float = 0.9
    """Of it, in [0, 1)."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("epsilon",), "zero or more", lambda v: v >= 0),
            (("noise_steps", "iterations", "batch_size"), "at least 1", lambda v: v >= 1),
            (("alpha",), "in [0, 1]", lambda v: 0 <= v <= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Train the masks, then prune as many channels as accuracy allows.

    Args:
      view: clean images (stored [n, H, W, C]) and labels [n]; τ is chosen on its `validation`, or on a fifth of the
        images where there is none, of fewer than 50 on all. key: draws images, perturbations and that fifth.
    Returns: the variables; the watch is shown the candidates (see :func:`bdjax.defenses._masks.swept`).
    Raises InputError for a model without batch normalisation, and for a loss that is not finite.
    """
    scales("anp", victim.model, victim.variables)
    view, judged = parted(view, jax.random.fold_in(key, 0))
    size = batch_of(config.batch_size, config.batch_size)
    order = jax.random.randint(jax.random.fold_in(key, 1), (config.iterations, size), 0, len(view.labels))
    values = Masking(config.learning_rate, config.momentum, config.alpha, config.epsilon)
    steps = config.noise_steps if config.epsilon else 0
    masks = learnt(
        victim.model, victim.variables, view, order, values, steps, config.augment, jax.random.fold_in(key, 2),
        "training masks",
    )  # fmt: skip
    return swept(victim, masks, config, judged, view.watch)
