"""AGE: edit the weights of the later layers by the mean activations of the defender's images, in one forward pass.

F. Hsieh, H. H. Nguyen, A. MaungMaung, D. Usynin and I. Echizen, "Mitigating Backdoor Attacks using Activation-Guided
Model Editing", 2024, arXiv:2407.07662. The paper does not name its method.

Threat model: the defender has the model and a few images (512; 4 suffice), with labels that only repair and detection
use. With `backdoor_knowledge` (BDK in the paper) the images carry the true trigger, otherwise they are clean.

For each layer l with a kernel θ_l in the second half of the network:

    A_l = -(mean over batches of the layer's output, bias included, before normalisation)
    A_l <- adaptive average pooling of A_l to the kernel's shape
    A_l <- γ (A_l - μ) / sqrt(σ² + ε) + λ,     μ, σ² over all elements, γ = 0.5, λ = 1
    θ_l <- θ_l * A_l

Biases and batch normalisation are not edited. In the paper the BatchNorm statistics are frozen with backdoor knowledge;
without it the pass is in training mode and updates them, batch by batch.

Axes: a map is [N, H, W, O], so A_l is [H, W, O]; a kernel is [kH, kW, I, O]. H is pooled to kH and W to kW, and the
factor [kH, kW, 1, O] is the same for all I: bin i of m over n positions takes floor(i n / m) to ceil((i + 1) n / m) -
1. In PyTorch's layout that is A_l [O, H, W] viewed as [O, 1, H, W] and pooled over its last three axes to [I, kH, kW].

Why it works: where a trigger sends all images to one class, the logit of that class is the outlier among the C. After
negation its score is about -sqrt(C - 1), its factor about -0.5 for C = 10, and the weights of the class change sign.
ASR and the class's own accuracy fall to zero together. Repair restores part of the accuracy: an epoch of training on
the clean images, then (with backdoor knowledge) on the triggered ones, both with true labels.

Detection uses the edit without backdoor knowledge, and the class accuracies before and after it on the defender's
images. The paper looks for one class with an unusual drop and does not print its rule.

Deviations:

- The edit changes the inputs of every later layer, so by default the statistics are re-estimated afterwards on the
  clean images (ours): m images replace a fraction m / (m + 32) of the old statistics, mean and variance alike.
- Dropout stays off in the pass (ours).
- A dense kernel [I, O] has the factor [1, O] (our reading; pooling a vector of O to [O, I] directly would mix the
  classes).
- Detection rule (ours): the class with the largest drop; the model is judged to be backdoored if that drop has an
  anomaly index (metrics.anomaly_index) above `threshold` and less than the fraction `collapse` of the accuracy remains.
- The trigger is the test-time one, where the paper uses its training strength.
- Repair is SGD with momentum; the paper prints the learning rate alone.
- Batches are of equal size, so that a few images (fewer than there are batches) are left out.
- "Half of the total weights" is read as half of the scalars in the kernels; see `share_of`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax.defenses._activation_edit import Edit, detect_by_edit, edit_weights
from bdjax.defenses._trigger import triggered
from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float

NEEDS_TRIGGER = "backdoor_knowledge"
"""The Config field that decides whether the true trigger is required."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the edit, its repair and its detection."""

    backdoor_knowledge: bool = False
    """Use triggered images in place of clean ones; this requires the true trigger."""
    share: float = 0.5
    """Part of the network that is edited, counted from the output; in (0, 1]."""
    share_of: Literal["layers", "scalars"] = "scalars"
    """Unit of `share`: layers with a kernel, or scalars in the kernels. The layer at the border is included."""
    batch_size: int = 128
    """Images per batch, at most."""
    scale: float = 0.5
    """γ, standard deviation of the factors; positive."""
    shift: float = 1.0
    """λ, mean of the factors."""
    epsilon: float = 1e-5
    """ε, added to the variance; positive."""
    batch_norm: Literal["reestimated", "frozen", "updated"] | None = "reestimated"
    """Running statistics: re-estimated on the clean images after the edit, unchanged, or updated by the pass; None: as
    in the paper, frozen with backdoor knowledge and updated without."""
    repair: bool = False
    """Train on the images after the edit; with few images of many classes this can destroy the model."""
    epochs: int = 1
    """Epochs of each stage of the repair."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser of the repair."""
    learning_rate: float = 1e-2
    """Learning rate of the repair."""
    momentum: float = 0.9
    """Momentum of the repair's SGD, in [0, 1)."""
    threshold: float = 3.0
    """Detection: anomaly index that the largest drop must exceed, in deviations estimated by the median."""
    collapse: float = 0.5
    """Detection: less than this fraction of the class's accuracy must remain; in (0, 1]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("share", "collapse"), "in (0, 1]", lambda v: 0 < v <= 1),
            (("batch_size", "epochs"), "at least 1", lambda v: v >= 1),
            (("scale", "epsilon", "learning_rate"), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Edit the later layers by their mean activations, then repair if `config.repair` is set.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]), labels [n] for the repair, and the trigger with backdoor knowledge. Its
        callback receives the variables after the edit and after each epoch of repair.
      key: draws the batches and the trigger.

    Returns:
      The cleaned variables.

    Raises:
      InputError: when a required trigger is missing, or the model does not provide the outputs of its layers.
    """
    images: Any = view.images
    if config.backdoor_knowledge:
        images = triggered("age with backdoor_knowledge", view, jax.random.fold_in(key, 1))
    variables = edit_weights(_edit_of(config), victim, images, key)
    if config.batch_norm == "reestimated":
        variables = _reestimate_statistics(victim.model, variables, view.images, config.batch_size)
    view.callback.on_progress("editing", 1, 1)
    view.callback.on_round_end(1, variables)
    if not config.repair:
        return variables
    recipe = FitConfig(config.epochs, config.batch_size, config.optimizer, config.learning_rate, config.momentum)
    stages = [(view.images, "repair on clean images")]
    if config.backdoor_knowledge:
        stages.append((images, "repair on triggered images"))
    for index, (stage_images, stage) in enumerate(stages):
        current = Victim(victim.model, variables)
        variables = tune(
            current, stage_images, view.labels, recipe, jax.random.fold_in(key, 2 + index), view.callback, stage,
            before=1 + index * config.epochs,
        )  # fmt: skip
    return variables


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Find the class that the edit without backdoor knowledge and without repair makes the model forget.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the batches.

    Returns:
      For each class the anomaly index of its drop in accuracy on the defender's images.

    Raises:
      InputError: when the model does not provide the outputs of its layers.
    """
    edit = _edit_of(replace(config, backdoor_knowledge=False, share_of="layers", batch_norm=None))
    return detect_by_edit(edit, config.threshold, config.collapse, victim, view, key)


def _edit_of(config: Config) -> Edit:
    """The hyper-parameters of the edit."""
    updated = (config.batch_norm or ("frozen" if config.backdoor_knowledge else "updated")) == "updated"
    return Edit(config.share, config.share_of, config.batch_size, config.scale, config.shift, config.epsilon, updated)


_PRIOR_IMAGES = 32
"""Weight of the old BatchNorm statistics in the re-estimation, as a number of images."""


def _reestimate_statistics(model: Model, variables: Variables, images: Any, batch_size: int) -> Variables:
    """Return the variables with BatchNorm statistics re-estimated on stored images [n, H, W, C], in equal batches."""
    if not variables["batch_stats"]:
        return variables
    batch_count = -(-len(images) // batch_size)
    size = len(images) // batch_count
    old_stats, batch_statistics = variables["batch_stats"], _batch_statistics(model)
    starts = range(0, batch_count * size, size)
    batch_stats = [batch_statistics(variables, to_float(images[start : start + size])) for start in starts]
    weight = batch_count * size / (batch_count * size + _PRIOR_IMAGES)
    new_stats = jax.tree.map(lambda *leaves: sum(leaves) / batch_count, *batch_stats)
    return {**variables, "batch_stats": jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, old_stats, new_stats)}


@lru_cache(maxsize=16)
def _batch_statistics(model: Model) -> Callable:
    """Compile (variables, images) -> statistics of the batch, whatever the momentum of the running statistics."""

    def statistics(variables: Variables, images: jax.Array) -> Any:
        def updated(value: float) -> Any:
            start = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), variables["batch_stats"])
            return model.apply({"params": variables["params"], "batch_stats": start}, images, True)[2]

        # running statistics are linear in the old ones: momentum * old + (1 - momentum) * batch
        from_zero, from_one = updated(0.0), updated(1.0)
        return jax.tree.map(lambda a, b: a / jnp.maximum(1 - (b - a), 1e-6), from_zero, from_one)

    return jax.jit(statistics)
