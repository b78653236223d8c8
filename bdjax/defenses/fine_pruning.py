"""Fine-Pruning: prune the units that clean images leave idle, then fine-tune (Liu, Dolan-Gavitt and Garg, RAID 2018).

Threat model: the defender has the model and clean labelled images, no trigger.

    1  of what the last dense layer is given, a_i = mean over the images of max(feature_i, 0)
    2  ascending in a, set rows of its kernel to zero, a hundredth of them at a time, while validation accuracy lasts
    3  train on with the clean images; pruned rows stay zero

The defaults are BackdoorBench's: accuracy may fall by a tenth of itself, and the recipe of fine-tuning is SGD 0.01
along a cosine, 100 epochs, weight decay 5e-4. The paper prunes channels of the last convolution, which are these units
where a mean over all places stands before the dense layer (resnet18, preact_resnet18, mobilenet_v2), and stops at
about 4 points.

Works on every model whose last layer is a dense one called "head": all in bdjax.models, with batch normalisation or
without.

Deviations: BackdoorBench stops by the *test* accuracy, also where it rises by a tenth, prunes one unit fewer than it
counts, and keeps the step that broke the rule, for its copy is the live network; here accuracy is that of validation
images, and the last step within the budget is kept. ELU networks have negative activations, which count as idle (ours;
BackdoorBench takes the plain mean: the same on ReLU networks). Activations are of the images as they are (there:
cropped and flipped). Images are cropped, not flipped, in fine-tuning (`augment=crop_flip` is theirs). Units of the
same activation, as the many that are never active, go in the order of their places. At least one unit stays. A last,
smaller batch of an epoch is left out.
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
    """How much is pruned, and the recipe of fine-tuning."""

    step: float = 0.01
    """Share of the units that goes at a time, rounded up; in (0, 1]."""
    largest_drop: float = 0.1
    """Of the accuracy on validation images, relative to the given model's: pruning ends before it; in [0, 1]."""
    epochs: int = 100
    """Of fine-tuning; 0: prune alone."""
    batch_size: int = 256
    """Images a step; all of them when there are fewer."""
    learning_rate: float = 0.01
    """At the first step, of SGD."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """L2 term added to the gradient."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Cosine to zero, or times 0.1 at 50 % and 75 % of the epochs."""
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
    """Prune by validation accuracy, then fine-tune what is left.

    Args:
      view: clean images (stored [n, H, W, C]) and labels [n]; pruning ends by its `validation`, or by a fifth of the
        images where there is none, of fewer than 50 by all. key: shuffles and augments, and draws that fifth.
    Returns: the variables; the watch is shown them after pruning (with how many units were `pruned`) and after each
      epoch. Raises InputError for a model without a dense layer "head", and for a loss that is not finite.
    """
    view, judged = parted(view, jax.random.fold_in(key, 0))
    kernel = np.asarray(models.head(victim.variables["params"]))
    order = ranking(_features(victim, view))
    count = prunable(order, _features(victim, judged), judged.labels, victim.variables["params"], config)
    kept = np.ones((len(kernel), 1), np.float32)
    kept[order[:count]] = 0
    given = {"kept": jnp.asarray(kept)}
    variables: Variables = {**victim.variables, "params": _held(victim.variables["params"], given)}
    view.watch.observe(1, variables, pruned=jnp.int32(count))
    if not config.epochs:
        return variables
    recipe = FitConfig(
        config.epochs, config.batch_size, "sgd", config.learning_rate, config.momentum, config.weight_decay,
        config.schedule, config.augment,
    )  # fmt: skip
    for done in epochs(
        Victim(victim.model, variables), view.images, view.labels, recipe, jax.random.fold_in(key, 1), view.watch,
        "fine-tuning", projection=_held, given=given,
    ):  # fmt: skip
        variables = done.variables
        view.watch.observe(1 + done.number, variables, train_loss=done.loss, train_accuracy=done.accuracy)
    return variables


def ranking(features: np.ndarray) -> np.ndarray:
    """Units by how idle they are, the most first: int [D], of features [n, D]."""
    return np.argsort(np.maximum(features, 0).mean(0, dtype=np.float64), kind="stable")


def prunable(order: np.ndarray, features: np.ndarray, labels: np.ndarray, params: Any, config: Config) -> int:
    """How many of `order`'s units may go until accuracy falls by `largest_drop` of itself.

    Args: features [n, D] and labels [n] that it is measured on; params: whose last layer reads the features.
    """
    kernel, bias = np.array(models.head(params)), np.asarray(params["head"].get("bias", 0))
    if features.shape[1] != len(kernel):
        raise InputError(
            f"the last feature has {features.shape[1]} values and the last layer reads {len(kernel)}: fine_pruning "
            "cannot tell which of them are units. Use another model."
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
    """What the last dense layer is given, float32 [n, D]."""
    return activations(victim.model, victim.variables, view.images, {})[1]


def _held(params: Any, given: Any) -> Any:
    """The parameters with the pruned rows of the last layer at zero."""
    return models.with_kernels(params, {"head/kernel": models.head(params) * given["kept"]})
