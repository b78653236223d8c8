"""MESA fine-tuning: recover triggers, then fine-tune with them and the true labels (Qiao et al., NeurIPS 2019).

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

BAERASER's "Fine-Tuning" baseline: the recovery of BAERASER (:mod:`bdjax.defenses._staircase`), then plain training,

    mean CE(f(x), y),    x with a kept trigger on for a share of the images, y always the true label,

in training mode, by MESA's recipe: SGD 1e-3 with momentum 0.9 and no weight decay, batches of 128, 10 epochs, 1 % of
the images triggered (drawn anew each epoch). If no trigger is kept, the model is given back as it is.

Deviations: MESA is told the target, here all labels are tried; it goes through its three generators epoch by epoch,
here every image gets a trigger from the pool of what they drew; at least one image an epoch has one.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import Showing, stamper
from bdjax.defenses._staircase import RecoveryConfig, recover
from bdjax.engine import FitConfig, fit_with_hook
from bdjax.errors import check_fields
from bdjax.types import Batch, DefenderView, Images, Key, SampleInfo, TrainingHook, Variables, Victim


@dataclass(frozen=True)
class Config(RecoveryConfig):
    """Recovery (the fields of RecoveryConfig) and fine-tuning."""

    epochs: int = 10
    """Passes over the clean images."""
    fraction: float = 0.01
    """Share of them that carries a recovered trigger, in (0, 1]; MESA sweeps it up to 0.1."""
    learning_rate: float = 1e-3
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    weight_decay: float = 0.0
    """L2 term added to the gradient."""

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
    """Recover triggers of every label, and fine-tune against those that work.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: draws all that is random.
    Returns: the variables; the watch is shown them, the suspected labels and the recovered triggers after each epoch,
      or once if no label is suspected. Raises InputError as `recover` does, and for a loss that is not finite.
    """
    pool = recover(config, victim, view, jax.random.fold_in(key, 0))
    callback = Showing(view.callback, pool)
    if not len(pool.suspected()):
        callback.on_round_end(1, given := {**victim.variables})
        return given
    size = batch_of(config.batch_size, len(view.labels), "clean images a step")
    share = max(config.fraction, 1 / (len(view.labels) // size * size))
    hook = TrainingHook(config.form, (share,), _triggered)
    recipe = FitConfig(
        config.epochs, size, "sgd", config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    return fit_with_hook(
        victim.model, view.images, view.labels, recipe, jax.random.fold_in(key, 1), hook, {"fixed": {"pool": pool}},
        start=victim.variables, callback=callback, stage="fine-tuning", part="defense",
    )[0]  # fmt: skip


def _triggered(form: Any, given: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """The batch with a kept trigger on the images of role 1, and the true labels."""
    stamped, _ = stamper(form)(given["fixed"]["pool"], images, info.key)
    return Batch(jnp.where((info.role == 1)[:, None, None, None], stamped, images), labels)
