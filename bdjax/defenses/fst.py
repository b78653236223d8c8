"""FST: fine-tune from a re-initialised last layer that is pushed away from the old one.

R. Min, Z. Qin, L. Shen and M. Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS 2023,
arXiv:2310.01875.

Threat model: the defender has the model and a few clean labelled images (2 % of the training set), and no trigger.

    min_θ  mean CE(f_θ(x), y) + α <W, W_b>,      W the kernel of the last layer, W_b the victim's
    W <- W ‖W_b‖ / ‖W‖  after every step         (Frobenius norms)

All weights start at the victim's, except kernel and bias of the last layer, which are drawn from
U[-1/sqrt(D), 1/sqrt(D)] with D its number of inputs. The penalty moves the classifier away from the compromised one,
and the features change accordingly. Batch normalisation is in training mode. The defaults follow the release's README:
α = 0.1 (its command line defaults to 0.2; with 100 classes or more a small α or none), SGD at 0.01 with momentum 0.9
and no weight decay, 10 epochs, batches of 128.

Requires a model whose last layer is a dense layer named "head": every model in bdjax.models.

What to expect: as the classifier starts from scratch, accuracy depends on the number of steps. A few hundred images
make few steps in 10 epochs, and clean accuracy can remain low; increase `epochs` then.

Deviations:
- The cosine schedule decreases the learning rate with every step; the release decreases it with every epoch.
- Images are cropped but not flipped (`augment=crop_flip` does both, as the release does on CIFAR-10).
- The last, smaller batch of an epoch is dropped.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax import models
from bdjax.defenses._epochs import train_epochs
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The penalty, and the recipe of fine-tuning."""

    alpha: float = 0.1
    """α, weight of the inner product with the kernel of the victim's last layer; zero or more."""
    epochs: int = 10
    """Passes over the clean images."""
    batch_size: int = 128
    """Images per step; all of them when there are fewer."""
    learning_rate: float = 0.01
    """Learning rate of SGD at the first step."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    weight_decay: float = 0.0
    """Coefficient of the L2 term added to the gradient."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Learning rate: constant, cosine to zero, or times 0.1 at 50 % and 75 % of the steps."""
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
    """Re-initialise the last layer, and fine-tune all weights with the penalty.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the variables after each epoch.
      key: random key that draws the last layer, and shuffles and augments the images.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no dense layer "head", or when the loss becomes NaN or infinite.
    """
    old_kernel = jnp.array(models.head(victim.variables["params"]))
    params = reinitialise_head(victim.variables["params"], jax.random.fold_in(key, 0))
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay,
        config.schedule, config.augment,
    )  # fmt: skip
    variables: Variables = {**victim.variables, "params": params}
    for epoch in train_epochs(
        Victim(victim.model, variables), view.images, view.labels, recipe, jax.random.fold_in(key, 1), view.callback,
        "feature shift tuning", term=_penalty, projection=_rescale_kernel,
        extra={"old_kernel": old_kernel, "alpha": jnp.float32(config.alpha)},
    ):  # fmt: skip
        variables = epoch.variables
        view.callback.on_round_end(epoch.number, variables, train_loss=epoch.loss, train_accuracy=epoch.accuracy)
    return variables


def reinitialise_head(params: Any, key: Key) -> Any:
    """Draw kernel and bias of the last layer from U[-1/sqrt(D), 1/sqrt(D)], as PyTorch does; return all parameters."""
    kernel = models.head(params)
    leaves, limit = models.kernels(params), len(kernel) ** -0.5
    drawn = {
        path: jax.random.uniform(jax.random.fold_in(key, index), leaves[path].shape, leaves[path].dtype, -limit, limit)
        for index, path in enumerate(("head/kernel", "head/bias"))
        if path in leaves
    }
    return models.with_kernels(params, drawn)


def _penalty(params: Any, extra: Any) -> jax.Array:
    """Return α times the inner product of the last layer's kernel with the old one."""
    return extra["alpha"] * (models.head(params) * extra["old_kernel"]).sum()


def _rescale_kernel(params: Any, extra: Any) -> Any:
    """Return the parameters with the last layer's kernel rescaled to the Frobenius norm of the old one."""
    kernel = models.head(params)
    length = jnp.sqrt((extra["old_kernel"] ** 2).sum()) / jnp.maximum(jnp.sqrt((kernel**2).sum()), 1e-12)
    return models.with_kernels(params, {"head/kernel": kernel * length})
