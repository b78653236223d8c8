"""BTI-DBF (U): invert the backdoor by decoupling benign features, then unlearn it.

X. Xu, K. Huang, Y. Li, Z. Qin and K. Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", ICLR 2024.

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Each round first trains a generator G whose images differ from clean ones in backdoor features only
(:mod:`bdjax.defenses._inversion`), and then trains the model. With x' the batch in which int(0.1 B) + 1 of the B images
pass through G:

    min_θ  mean CE(f_θ(x'), y) + MSE(feat_θ(x), feat_θ(x'))

Batch normalisation is in training mode. Each round has 30 epochs of Adam at 1e-4, whose moments carry over from round
to round. The defaults are those of the release and its README: 5 rounds, batches of 128. The purification variant (P),
which puts a network in front of the model instead of changing the model, is not implemented.

Cost: 50 epochs of pretraining G, then in every round 20 epochs of the mask, 30 of G and 30 of the model. G is trained
for 200 epochs in all, and is a large network: a forward pass takes about 0.19 billion multiply-adds per 32x32 image.
For small classifiers it dominates the cost; on a CPU its compilation takes over a minute (see `width` and `downs`).

Deviations:
- The release evaluates on triggered images every ten epochs, which has no effect on the result and is left out.
- Images are cropped but not flipped (`augment=crop_flip` does both, as the release does on CIFAR-10).
- Every epoch is divided into batches of equal size.
- The deviations of the inversion are listed in :mod:`bdjax.defenses._inversion`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import optax

from bdjax.defenses._inversion import InversionConfig, alternate
from bdjax.defenses._inversion_steps import classify, max_chosen, mix_generated, penultimate_features
from bdjax.defenses._tuning import descend, training_state
from bdjax.engine import augment, parallel
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config(InversionConfig):
    """The inversion (the fields of InversionConfig) and unlearning."""

    epochs: int = 30
    """Epochs of unlearning, in every round."""
    fraction: float = 0.1
    """Share of a batch that passes through G, in [0, 1), to which one image is added."""
    learning_rate: float = 1e-4
    """Learning rate of Adam in unlearning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("epochs",), "at least 1", lambda v: v >= 1),
            (("fraction",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("learning_rate",), "positive", lambda v: v > 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Alternate between inversion and unlearning.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each epoch of unlearning, its callback receives
        the variables, G(x) - x of four images (`perturbation`), and the class that is predicted most often for the
        generator's images (`suspected`).
      key: random key that draws the masks, the batches and the generator.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no dense layer "head", when the batch size or the number of images is smaller than
        the number of devices, or when the loss becomes NaN or infinite.
    """
    return alternate(config, victim, view, key, "BTI-DBF", _step, training_state(victim.variables, "adam"), {})


@lru_cache(maxsize=16)
def _step(model: Model, generator: Callable, policy: str, fraction: float, size: int) -> Callable:
    """Return one step of unlearning, in the engine's form."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels = constants["labels"][batch["index"]]
        mixed = mix_generated(
            generator, constants["generator"], images, batch["chosen"], max_chosen(fraction, size, axis)
        )  # fmt: skip
        second_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(batch["dropout"])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            clean, stats = penultimate_features(model, variables, images, True, batch["dropout"], axis)
            features, stats = penultimate_features(
                model, {**variables, "batch_stats": stats}, mixed, True, second_keys, axis
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(classify(params, features), labels)
            label_loss, feature_loss = losses.mean(), ((clean - features) ** 2).mean()
            value = label_loss + feature_loss
            return value, (stats, {"loss": value, "label_loss": label_loss, "feature_loss": feature_loss})

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, stats, "adam", per_step["rate"]), metrics

    return step
