"""AGE: edit the later layers by what the defender's images activate, in one forward pass (Hsieh et al., 2024).

Of "Mitigating Backdoor Attacks using Activation-Guided Model Editing", which leaves its method without a name.

Threat model: the defender has the model and a few images (512; 4 do), labelled only for repair and detection. With
`backdoor_knowledge` (BDK in the paper) they carry the true trigger, without it they are clean.

Of each layer l with a kernel θ_l in the second half of the network:

    A_l = -(mean over batches of what the layer gives, bias included, before normalisation)
    A_l <- adaptive average pooling of A_l to the kernel's shape
    A_l <- γ (A_l - μ) / sqrt(σ² + ε) + λ,     μ, σ² over all elements, γ = 0.5, λ = 1
    θ_l <- θ_l * A_l

Biases and batch normalisation are not edited. In the paper the statistics are frozen with knowledge; without it the
pass is in training mode and moves them, batch by batch (dropout stays off; ours). The edit changes what every later
layer is given, so by default the statistics are estimated anew afterwards on the clean images (ours): m images replace
m / (m + 32) of the old ones, mean and variance alike.

Axes: a map is [N, H, W, O], so A_l is [H, W, O]; a kernel is [kH, kW, I, O]. H is pooled to kH and W to kW, the factor
[kH, kW, 1, O] is the same for all I: bin i of m over n places takes floor(i n / m) to ceil((i + 1) n / m) - 1. In
PyTorch's layout that is A_l [O, H, W] seen as [O, 1, H, W] and pooled over its last three axes to [I, kH, kW]. A dense
kernel [I, O] has the factor [1, O] (our reading; pooling a vector of O to [O, I] as it stands would mix them up).

Why it works: where a trigger sends all images to one class, that logit is the outlier of the C; negated, its score is
about -sqrt(C - 1), its factor about -0.5 for C = 10, and the class's weights change sign. ASR and the class's own
accuracy fall to zero together, which repair mends in part: an epoch of training on the images, clean first, then (with
knowledge) triggered, true labels both.

Detection, from the edit without knowledge: class accuracies before and after on the defender's own images. The paper
looks for one class with an unusual drop and does not print its rule. Ours: the class of the largest drop, poisoned if
that has an anomaly index (metrics.anomaly_index) above `threshold` and less than `collapse` of the accuracy is left.

Deviations: the trigger is the test-time one, where the paper shows its training strength. Repair is SGD with momentum,
of which the paper prints the rate alone. Batches are of equal size, so that a few images (fewer than there are batches)
are left out. "Half of the total weights" is read as half of the numbers in the kernels; see `share_of`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.defenses._trigger import triggered
from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig, predict
from bdjax.errors import check_fields
from bdjax.metrics import anomaly_index, class_accuracy
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float

NEEDS_TRIGGER = "backdoor_knowledge"


@dataclass(frozen=True)
class Config:
    """The edit, its repair and its detection."""

    backdoor_knowledge: bool = False
    """Show the network triggered images in place of clean ones; the defender is given the true trigger."""
    share: float = 0.5
    """Part of the network that is edited, counted from the output; in (0, 1]."""
    share_of: Literal["layers", "scalars"] = "scalars"
    """What `share` is of: layers with a kernel, or numbers in the kernels. The layer that the border is in counts."""
    batch_size: int = 128
    """Images a batch, at most."""
    scale: float = 0.5
    """γ, standard deviation of the factors; positive."""
    shift: float = 1.0
    """λ, mean of the factors."""
    epsilon: float = 1e-5
    """ε, added to the variance; positive."""
    batch_norm: Literal["reestimated", "frozen", "updated"] | None = "reestimated"
    """Running statistics: estimated anew on the clean images after the edit, as they were, or updated by the pass;
    None: the paper's, frozen with backdoor knowledge and updated without."""
    repair: bool = False
    """Train on the images after the edit; for few images of many classes it can destroy the model."""
    epochs: int = 1
    """Passes of each stage of the repair."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Of the repair."""
    learning_rate: float = 1e-2
    """Of the repair."""
    momentum: float = 0.9
    """Of the repair's SGD, in [0, 1)."""
    threshold: float = 3.0
    """Detection: how many deviations, estimated by the median, the largest drop must stand out by."""
    collapse: float = 0.5
    """Detection: less than this part of the class's accuracy must be left; in (0, 1]."""

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
    """Edit the later layers by their mean activations, then repair if asked to.

    Args: view: clean images (stored [n, H, W, C]), labels [n] for the repair, and the trigger with backdoor knowledge.
    Returns: the variables; the watch is shown them after the edit and after each epoch of repair.
    Raises InputError without a trigger that is needed, and for a model that does not tell its layers' outputs.
    """
    images: Any = view.images
    if config.backdoor_knowledge:
        images = triggered("age with backdoor_knowledge", view, jax.random.fold_in(key, 1))
    variables = _edited(config, victim, images, key)
    if config.batch_norm == "reestimated":
        variables = _reestimated(victim.model, variables, view.images, config.batch_size)
    view.callback.on_progress("editing", 1, 1)
    view.callback.on_round_end(1, variables)
    if not config.repair:
        return variables
    recipe = FitConfig(config.epochs, config.batch_size, config.optimizer, config.learning_rate, config.momentum)
    stages = [(view.images, "repair on clean images")]
    if config.backdoor_knowledge:
        stages.append((images, "repair on triggered images"))
    for done, (shown, stage) in enumerate(stages):
        own = Victim(victim.model, variables)
        variables = tune(
            own, shown, view.labels, recipe, jax.random.fold_in(key, 2 + done), view.callback, stage,
            before=1 + done * config.epochs,
        )  # fmt: skip
    return variables


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Which class the edit without backdoor knowledge and without repair makes the model forget, and whether one.

    Args: as of :func:`purify`, the trigger aside; labels are needed.
    Returns: how unusual the drop of each class's accuracy on the defender's images is.
    """
    paper = replace(config, backdoor_knowledge=False, share_of="layers", batch_norm=None)
    edited = _edited(paper, victim, view.images, key)
    labels = jnp.asarray(view.labels)
    before, after = (
        class_accuracy(jnp.asarray(predict(victim.model, variables, view.images)), labels, victim.model.classes)
        for variables in (victim.variables, edited)
    )
    found = np.asarray(anomaly_index(before - after))
    target = int(np.nanargmax(found))
    poisoned = found[target] > config.threshold and after[target] < config.collapse * before[target]
    return Scores(found, target, float(found[target]), bool(poisoned))


_PRIOR = 32
"""Images that the old statistics of BatchNorm count for when they are estimated anew."""


def _reestimated(model: Model, variables: Variables, images: Any, batch_size: int) -> Variables:
    """The variables with BatchNorm's statistics estimated on stored images [n, H, W, C] of equal batches."""
    if not variables["batch_stats"]:
        return variables
    number = -(-len(images) // batch_size)
    size = len(images) // number
    old, program = variables["batch_stats"], _statistics(model)
    found = [program(variables, to_float(images[begin : begin + size])) for begin in range(0, number * size, size)]
    weight = number * size / (number * size + _PRIOR)
    new = jax.tree.map(lambda *leaves: sum(leaves) / number, *found)
    return {**variables, "batch_stats": jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, old, new)}


@lru_cache(maxsize=16)
def _statistics(model: Model) -> Callable:
    """(variables, images) -> the batch's own statistics, whatever momentum the model's running ones have."""

    def run(variables: Variables, images: jax.Array) -> Any:
        def after(value: float) -> Any:
            start = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), variables["batch_stats"])
            return model.apply({"params": variables["params"], "batch_stats": start}, images, True)[2]

        zero, one = after(0.0), after(1.0)  # running statistics are linear: momentum * old + (1 - momentum) * batch
        return jax.tree.map(lambda a, b: a / jnp.maximum(1 - (b - a), 1e-6), zero, one)

    return jax.jit(run)


def factor(activation: jax.Array, shape: tuple[int, ...], scale: Any, shift: Any, epsilon: Any) -> jax.Array:
    """What a kernel of `shape` [*K, I, O] is multiplied by, [*K, 1, O], of its layer's mean activation [*S, O].

    A dense layer (no K) may have been applied to many places: they are averaged.
    """
    pooled, places = -activation.astype(jnp.float32), shape[:-2]
    if not places:
        pooled = pooled.reshape(-1, pooled.shape[-1]).mean(0)
    for axis, size in enumerate(places):
        pooled = jnp.moveaxis(jnp.tensordot(_bins(pooled.shape[axis], size), pooled, (1, axis)), 0, axis)
    centred = pooled - pooled.mean()
    return jnp.expand_dims(scale * centred / jnp.sqrt((centred**2).mean() + epsilon) + shift, -2)


def _bins(places: int, bins: int) -> np.ndarray:
    """Adaptive average pooling along one axis as a matrix, float32 [bins, places]."""
    found = np.zeros((bins, places), np.float32)
    for i in range(bins):
        begin, end = i * places // bins, -(-(i + 1) * places // bins)
        found[i, begin:end] = 1 / (end - begin)
    return found


class _Static(NamedTuple):
    """What of a Config changes the compiled program."""

    share: float
    share_of: str
    batch_size: int
    updated: bool


def _edited(config: Config, victim: Victim, images: Any, key: Key) -> Variables:
    updated = (config.batch_norm or ("frozen" if config.backdoor_knowledge else "updated")) == "updated"
    program = _editor(victim.model, _Static(config.share, config.share_of, config.batch_size, updated))
    hyper = {name: jnp.float32(getattr(config, name)) for name in ("scale", "shift", "epsilon")}
    return program(victim.variables, jnp.asarray(images), jax.random.fold_in(key, 0), hyper)


@lru_cache(maxsize=16)
def _editor(model: Model, static: _Static) -> Callable:
    """(variables, stored images, key, hyper) -> edited variables, one program."""

    def run(variables: Variables, images: jax.Array, key: Key, hyper: Any) -> Variables:
        number = -(-len(images) // static.batch_size)
        size = len(images) // number
        order = jax.random.permutation(key, len(images))[: number * size].reshape(number, size)
        kernels = models.kernels(variables["params"])

        def one(stats: Any, index: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            now = {"params": variables["params"], "batch_stats": stats}
            outputs, stats = models.outputs(model, now, to_float(images[index]), static.updated)
            chosen = later([(path, kernels[path].size) for path in outputs], static.share, static.share_of)
            return stats, {path: outputs[path].astype(jnp.float32).mean(0) for path in chosen}

        stats, means = jax.lax.scan(one, variables["batch_stats"], order)  # no gradient: quick on a CPU, too
        changed = {
            path: kernels[path] * factor(mean.mean(0), kernels[path].shape, **hyper) for path, mean in means.items()
        }
        return {"params": models.with_kernels(variables["params"], changed), "batch_stats": stats}

    return jax.jit(run)


def later(layers: list[tuple[str, int]], share: float, share_of: str) -> list[str]:
    """The last of `layers`, (path, size of the kernel) in forward order, that make up `share` of them by `share_of`."""
    sizes = np.array([size if share_of == "scalars" else 1 for _, size in layers])
    ends = np.cumsum(sizes) / sizes.sum()
    return [path for (path, _), end in zip(layers, ends, strict=True) if end > 1 - share + 1e-9]
