"""MESA fine-tuning: recover triggers, then fine-tune on images that carry them with the true labels.

X. Qiao, Y. Yang and H. Li, "Defending Neural Backdoors via Generative Distribution Modeling", NeurIPS 2019,
arXiv:1910.04749. It is the "Fine-Tuning" baseline of BAERASER.

Threat model: the defender has the model and clean labelled images, but no trigger and no target label.

The recovery is that of BAERASER (:mod:`bdjax.defenses._staircase`). Then the model is trained in training mode on

    mean CE(f(x), y),    x with an accepted trigger for a share of the images, y always the true label,

with MESA's recipe: SGD 1e-3 with momentum 0.9 and no weight decay, batches of 128, 10 epochs, 1 % of the images
triggered (drawn anew in each epoch). If no trigger is accepted, the model is returned unchanged.

Deviations:

- MESA knows the target label; here all labels are tried.
- MESA uses its three generators in turn, one per epoch; here every image gets a trigger from the pool of their samples.
- At least one image per epoch carries a trigger.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import PoolCallback, stamper
from bdjax.defenses._staircase import RecoveryConfig, recover
from bdjax.engine import FitConfig, fit_with_hook
from bdjax.errors import check_fields
from bdjax.types import Batch, DefenderView, Images, Key, SampleInfo, TrainingHook, Variables, Victim


@dataclass(frozen=True)
class Config(RecoveryConfig):
    """Hyper-parameters of the recovery (the fields of RecoveryConfig) and of the fine-tuning."""

    epochs: int = 10
    """Passes over the clean images."""
    fraction: float = 0.01
    """Fraction of them that carries a recovered trigger, in (0, 1]; MESA tries values up to 0.1."""
    learning_rate: float = 1e-3
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    weight_decay: float = 0.0
    """L2 term that is added to the gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("epochs",), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("fraction",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("weight_decay",), "zero or more", lambda v: v >= 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Recover triggers for every label, and fine-tune on images that carry the accepted ones.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the variables, the suspected labels
        and the recovered triggers after each epoch, or once if no label is suspected.
      key: draws all random numbers.

    Returns:
      The cleaned variables; those of the victim when no label is suspected.

    Raises:
      InputError: as `recover`, and when the loss is not finite.
    """
    pool = recover(config, victim, view, jax.random.fold_in(key, 0))
    callback = PoolCallback(view.callback, pool)
    if not len(pool.suspected_labels()):
        callback.on_round_end(1, unchanged := {**victim.variables})
        return unchanged
    batch_size = batch_of(config.batch_size, len(view.labels), "clean images a step")
    share = max(config.fraction, 1 / (len(view.labels) // batch_size * batch_size))
    hook = TrainingHook(config.form, (share,), _add_triggers)
    recipe = FitConfig(
        config.epochs, batch_size, "sgd", config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    return fit_with_hook(
        victim.model, view.images, view.labels, recipe, jax.random.fold_in(key, 1), hook, {"fixed": {"pool": pool}},
        start=victim.variables, callback=callback, stage="fine-tuning", part="defense",
    )[0]  # fmt: skip


def _add_triggers(form: Any, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """Put an accepted trigger on the images of role 1, and keep the true labels."""
    stamped, _ = stamper(form)(attacker["fixed"]["pool"], images, info.key)
    return Batch(jnp.where((info.role == 1)[:, None, None, None], stamped, images), labels)
