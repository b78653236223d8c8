"""Fine-Pruning: prune the units that are least active on clean images, then fine-tune.

K. Liu, B. Dolan-Gavitt and S. Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
RAID 2018, arXiv:1805.12185.

Threat model: the defender has the model and clean labelled images, and no trigger.

    1  Measure the activation of each input unit i of the last dense layer: a_i = mean over the images of max(h_i, 0).
    2  In ascending order of a, set rows of that layer's kernel to zero, one percent of them at a time, for as long as
       validation accuracy stays within the budget.
    3  Fine-tune on the clean images; pruned rows stay zero.

The defaults are BackdoorBench's: accuracy may fall by 10 % of its value, and fine-tuning is SGD at 0.01 with a cosine
schedule, 100 epochs, weight decay 5e-4. The paper prunes the channels of the last convolution and stops at a drop of
about 4 percentage points. Those channels are the units pruned here wherever global average pooling precedes the dense
layer (resnet18, preact_resnet18, mobilenet_v2).

Requires a model whose last layer is a dense layer named "head": every model in bdjax.models, with or without batch
normalisation.

Deviations:
- BackdoorBench measures *test* accuracy, also stops where accuracy rises by 10 %, prunes one unit fewer than it counts,
  and returns the model after the step that exceeded the budget. Here accuracy is measured on validation images, and
  the last model within the budget is returned.
- Negative activations (ELU networks) count as zero. BackdoorBench takes the plain mean, which is the same for ReLU.
- Activations are measured on unaugmented images; BackdoorBench crops and flips them.
- Fine-tuning crops but does not flip (`augment=crop_flip` does both, as BackdoorBench does).
- Units with equal activation, such as the many that are never active, are pruned in index order. At least one unit is
  never pruned. The last, smaller batch of an epoch is dropped.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.defenses._epochs import train_epochs
from bdjax.defenses._masks import split_validation
from bdjax.engine import FitConfig, activations
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The budget of pruning, and the recipe of fine-tuning."""

    step: float = 0.01
    """Share of the units that is pruned at a time, rounded up; in (0, 1]."""
    largest_drop: float = 0.1
    """Drop of validation accuracy that pruning must stay below, relative to the victim's accuracy; in [0, 1]."""
    epochs: int = 100
    """Epochs of fine-tuning; 0: prune only."""
    batch_size: int = 256
    """Images per step; all of them when there are fewer."""
    learning_rate: float = 0.01
    """Learning rate of SGD at the first step."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """Coefficient of the L2 term added to the gradient."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Learning rate: constant, cosine to zero, or times 0.1 at 50 % and 75 % of the steps."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("step",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("largest_drop",), "in [0, 1]", lambda v: 0 <= v <= 1),
            (("batch_size",), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("epochs", "weight_decay"), "zero or more", lambda v: v >= 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Prune within the budget of validation accuracy, then fine-tune the remaining units.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]; accuracy is measured on its `validation` images, or on
        a fifth of the images where it has none (on all of them if there are fewer than 50). Its callback receives the
        variables after pruning (with the number of units `pruned`) and after each epoch.
      key: random key that draws the validation images, and shuffles and augments the others.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no dense layer "head", or when the loss becomes NaN or infinite.
    """
    view, validation = split_validation(view, jax.random.fold_in(key, 0))
    kernel = np.asarray(models.head(victim.variables["params"]))
    order = rank_units(_features(victim, view))
    count = count_prunable(
        order, _features(victim, validation), validation.labels, victim.variables["params"], config
    )  # fmt: skip
    row_mask = np.ones((len(kernel), 1), np.float32)
    row_mask[order[:count]] = 0
    extra = {"row_mask": jnp.asarray(row_mask)}
    variables: Variables = {**victim.variables, "params": _zero_pruned_rows(victim.variables["params"], extra)}
    view.callback.on_round_end(1, variables, pruned=jnp.int32(count))
    if not config.epochs:
        return variables
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay,
        config.schedule, config.augment,
    )  # fmt: skip
    for epoch in train_epochs(
        Victim(victim.model, variables), view.images, view.labels, recipe, jax.random.fold_in(key, 1), view.callback,
        "fine-tuning", projection=_zero_pruned_rows, extra=extra,
    ):  # fmt: skip
        variables = epoch.variables
        view.callback.on_round_end(1 + epoch.number, variables, train_loss=epoch.loss, train_accuracy=epoch.accuracy)
    return variables


def rank_units(features: np.ndarray) -> np.ndarray:
    """Return the indices of the units in ascending order of mean activation, int [D], from features [n, D]."""
    return np.argsort(np.maximum(features, 0).mean(0, dtype=np.float64), kind="stable")


def count_prunable(order: np.ndarray, features: np.ndarray, labels: np.ndarray, params: Any, config: Config) -> int:
    """Count the units that can be pruned with a relative drop of accuracy below `largest_drop`.

    Args:
      order: indices of the units in the order of pruning, int [D].
      features: inputs of the last layer on which accuracy is measured, [n, D].
      labels: their labels, [n].
      params: parameters of the victim.
      config: share of the units pruned at a time, and the budget.

    Returns:
      The number of units.

    Raises:
      InputError: when the features are not the inputs of the last layer.
    """
    kernel, bias = np.array(models.head(params)), np.asarray(params["head"].get("bias", 0))
    if features.shape[1] != len(kernel):
        raise InputError(
            f"the last feature has {features.shape[1]} values, but the last layer has {len(kernel)} inputs, so that "
            "fine_pruning cannot tell which values are its units. Use another model or another defense."
        )

    def accuracy() -> float:
        return float(((features @ kernel + bias).argmax(1) == labels).mean())

    before, step, count = accuracy(), math.ceil(config.step * len(kernel)), 0
    while count + step < len(kernel):
        kernel[order[: count + step]] = 0
        if before - accuracy() >= config.largest_drop * before:
            break
        count += step
    return count


def _features(victim: Victim, view: DefenderView) -> np.ndarray:
    """Return the inputs of the last dense layer, float32 [n, D]."""
    return activations(victim.model, victim.variables, view.images, {})[1]


def _zero_pruned_rows(params: Any, extra: Any) -> Any:
    """Return the parameters with the pruned rows of the last layer set to zero."""
    return models.with_kernels(params, {"head/kernel": models.head(params) * extra["row_mask"]})
