"""Fine-Pruning: prune the units that clean images leave idle, then fine-tune (Liu et al., RAID 2018).

K. Liu, B. Dolan-Gavitt and S. Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks".

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

Deviations from BackdoorBench:
- It measures *test* accuracy, also stops where accuracy rises by 10 %, prunes one unit fewer than it counts, and
  returns the model after the step that exceeded the budget. Here accuracy is measured on validation images, and the
  last step within the budget is kept.
- Negative activations (ELU networks) count as zero. BackdoorBench takes the plain mean, which is the same for ReLU.
- Activations are measured on unaugmented images; BackdoorBench crops and flips them.
- Fine-tuning crops but does not flip (`augment=crop_flip` does both, as BackdoorBench).
- Units with equal activation, such as the many that are never active, are pruned in index order. At least one unit is
  kept. The last, smaller batch of an epoch is dropped.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.defenses._epochs import epochs
from bdjax.defenses._masks import parted
from bdjax.engine import FitConfig, activations
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The budget of pruning, and the recipe of fine-tuning."""

    step: float = 0.01
    """Share of the units that is pruned at a time, rounded up; in (0, 1]."""
    largest_drop: float = 0.1
    """Pruning stays below this drop of validation accuracy, relative to the victim's; in [0, 1]."""
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
    """Prune within the budget of validation accuracy, then fine-tune what is left.

    Args:
      view: clean images (stored [n, H, W, C]) and labels [n]; accuracy is measured on its `validation` images, or on
        a fifth of the images where it has none (on all of them if there are fewer than 50); key: shuffles and augments,
        and draws that fifth.
    Returns: the variables; the watch is shown them after pruning (with the number of units `pruned`) and after each
      epoch.
    Raises InputError for a model without a dense layer "head", and for a loss that is not finite.
    """
    view, judged = parted(view, jax.random.fold_in(key, 0))
    kernel = np.asarray(models.head(victim.variables["params"]))
    order = ranking(_features(victim, view))
    count = prunable(order, _features(victim, judged), judged.labels, victim.variables["params"], config)
    kept = np.ones((len(kernel), 1), np.float32)
    kept[order[:count]] = 0
    given = {"kept": jnp.asarray(kept)}
    variables: Variables = {**victim.variables, "params": _held(victim.variables["params"], given)}
    view.callback.on_round_end(1, variables, pruned=jnp.int32(count))
    if not config.epochs:
        return variables
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay,
        config.schedule, config.augment,
    )  # fmt: skip
    for done in epochs(
        Victim(victim.model, variables), view.images, view.labels, recipe, jax.random.fold_in(key, 1), view.callback,
        "fine-tuning", projection=_held, given=given,
    ):  # fmt: skip
        variables = done.variables
        view.callback.on_round_end(1 + done.number, variables, train_loss=done.loss, train_accuracy=done.accuracy)
    return variables


def ranking(features: np.ndarray) -> np.ndarray:
    """Indices of the units in ascending order of activation, int [D]; features [n, D]."""
    return np.argsort(np.maximum(features, 0).mean(0, dtype=np.float64), kind="stable")


def prunable(order: np.ndarray, features: np.ndarray, labels: np.ndarray, params: Any, config: Config) -> int:
    """How many units, in the given order, can be pruned with a relative drop of accuracy below `largest_drop`.

    Args: order: int [D]; features [n, D], labels [n]: what accuracy is measured on; params: of the victim.
    """
    kernel, bias = np.array(models.head(params)), np.asarray(params["head"].get("bias", 0))
    if features.shape[1] != len(kernel):
        raise InputError(
            f"the last feature has {features.shape[1]} values, but the last layer has {len(kernel)} inputs, so that "
            "fine_pruning cannot tell which values are its units. Use another model or another defense."
        )

    def right() -> float:
        return float(((features @ kernel + bias).argmax(1) == labels).mean())

    before, step, count = right(), math.ceil(config.step * len(kernel)), 0
    while count + step < len(kernel):
        kernel[order[: count + step]] = 0
        if before - right() >= config.largest_drop * before:
            break
        count += step
    return count


def _features(victim: Victim, view: DefenderView) -> np.ndarray:
    """The input of the last dense layer, float32 [n, D]."""
    return activations(victim.model, victim.variables, view.images, {})[1]


def _held(params: Any, given: Any) -> Any:
    """The parameters with the pruned rows of the last layer at zero."""
    return models.with_kernels(params, {"head/kernel": models.head(params) * given["kept"]})
