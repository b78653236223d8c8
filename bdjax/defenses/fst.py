"""FST: fine-tune from a new last layer that is kept off the old one (Min et al., NeurIPS 2023).

Of "Towards Stable Backdoor Purification through Feature Shift Tuning". Threat model: the defender has the model and a
few clean labelled images (2 % of the training set), no trigger.

    min_θ  mean CE(f_θ(x), y) + α <W, W_b>,      W the last layer's kernel, W_b the victim's
    W <- W ‖W_b‖ / ‖W‖  after every step         (Frobenius norms)

from the victim's weights but for the last layer, kernel and bias, which start from U[-1/sqrt(D), 1/sqrt(D)], D its
inputs. As the features must follow a classifier that turns away from the compromised one, they leave what the trigger
uses. In training mode. The defaults are the release's README: α = 0.1 (its argument has 0.2; for a hundred classes or
more 0 or little), SGD 0.01 with momentum 0.9 and no weight decay, 10 epochs, batches of 128.

Works on every model whose last layer is a dense one called "head": all in bdjax.models.

Deviations: the cosine falls step by step here, epoch by epoch there. Images are cropped, not flipped
(`augment=crop_flip` is what the release does to CIFAR-10). A last, smaller batch of an epoch is left out, so that a
few hundred images make few steps.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax import models
from bdjax.defenses._epochs import epochs
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The recipe."""

    alpha: float = 0.1
    """α, weight of the inner product with the victim's last layer; zero or more."""
    epochs: int = 10
    """Passes over the clean images."""
    batch_size: int = 128
    """Images a step; all of them when there are fewer."""
    learning_rate: float = 0.01
    """At the first step, of SGD."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    weight_decay: float = 0.0
    """L2 term added to the gradient."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Cosine to zero, or times 0.1 at 50 % and 75 % of the epochs."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("alpha", "weight_decay"), "zero or more", lambda v: v >= 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Replace the last layer, and train everything away from the old one.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: draws the last layer, shuffles and augments.
    Returns: the variables; the watch is shown them after each epoch.
    Raises InputError for a model without a dense layer "head", and for a loss that is not finite.
    """
    old = jnp.array(models.head(victim.variables["params"]))
    params = restarted(victim.variables["params"], jax.random.fold_in(key, 0))
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay,
        config.schedule, config.augment,
    )  # fmt: skip
    variables: Variables = {**victim.variables, "params": params}
    for done in epochs(
        Victim(victim.model, variables), view.images, view.labels, recipe, jax.random.fold_in(key, 1), view.watch,
        "feature shift tuning", term=_alike, projection=_scaled,
        given={"old": old, "alpha": jnp.float32(config.alpha)},
    ):  # fmt: skip
        variables = done.variables
        view.watch.observe(done.number, variables, train_loss=done.loss, train_accuracy=done.accuracy)
    return variables


def restarted(params: Any, key: Key) -> Any:
    """The parameters with a last layer drawn anew, as PyTorch does: U[-1/sqrt(D), 1/sqrt(D)], the bias alike."""
    kernel = models.head(params)
    leaves, limit = models.kernels(params), len(kernel) ** -0.5
    drawn = {
        path: jax.random.uniform(jax.random.fold_in(key, place), leaves[path].shape, leaves[path].dtype, -limit, limit)
        for place, path in enumerate(("head/kernel", "head/bias"))
        if path in leaves
    }
    return models.with_kernels(params, drawn)


def _alike(params: Any, given: Any) -> jax.Array:
    return given["alpha"] * (models.head(params) * given["old"]).sum()


def _scaled(params: Any, given: Any) -> Any:
    """The parameters with the last layer's kernel as long as the old one's."""
    kernel = models.head(params)
    length = jnp.sqrt((given["old"] ** 2).sum()) / jnp.maximum(jnp.sqrt((kernel**2).sum()), 1e-12)
    return models.with_kernels(params, {"head/kernel": kernel * length})
