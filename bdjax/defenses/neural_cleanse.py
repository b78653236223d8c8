"""Neural Cleanse: find the smallest patch that sends images to each class, suspect the class whose patch is far too
small, unlearn it (Wang et al., IEEE S&P 2019).

Threat model: the defender has the model and clean labelled images, no trigger.

For every class t a mask m [H, W, 1] and a pattern p [H, W, C], both tanh(u) / (2 + 1e-7) + 0.5:

    min_{m, p} mean CE(f((1 - m) x + m p), t) + λ_t ‖m‖₁

λ_t starts at `cost`; it is multiplied by `multiplier` after `patience` epochs in a row in which the patch sends at
least `threshold` of the images to t, and divided by `multiplier`^1.5 after as many in which it does not. The smallest
mask that met the threshold is kept. A class is suspected when the anomaly index of its mask's norm (the distance below
the median in 1.4826 median absolute deviations) is above 2.

All classes are searched at once: the victim's weights are shared, so their images are one batch and their gradients do
not meet. Unlearning fine-tunes on the clean images, a share of them carrying a recovered patch of a suspected class
with their true labels. Nothing suspected: the model is returned as it is.

Deviations: constants are BackdoorBench's (the original: threshold 0.99; one epoch of unlearning on 10 % of the training
set). No early stop, for the classes run together. An epoch has at least eight steps, so that a few hundred images are
enough (ours). A class for which no mask met the threshold counts with a norm of H W, the largest there is (ours).
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._tuning import tune
from bdjax.engine import FitConfig, parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.errors import check_fields
from bdjax.metrics import anomaly_index
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The search, the verdict and the unlearning."""

    epochs: int = 80
    """Passes over the clean images in the search."""
    batch_size: int = 256
    """Images a step and class, at most an eighth of them."""
    step_size: float = 0.1
    """Adam's rate (betas 0.5 and 0.9) for mask and pattern."""
    threshold: float = 0.98
    """Share of the images that a patch must send to its class, in (0, 1]."""
    cost: float = 1e-3
    """λ at the start; positive."""
    multiplier: float = 2.0
    """Of λ; above 1."""
    patience: int = 5
    """Epochs in a row that change λ."""
    anomaly: float = 2.0
    """A class with an index above it is suspected; positive."""
    unlearning_epochs: int = 10
    """Passes of the fine-tuning."""
    stamped: float = 0.2
    """Share of the images that carry a recovered patch in the fine-tuning, in (0, 1]."""
    learning_rate: float = 0.01
    """Of the fine-tuning, SGD with momentum 0.9."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size", "patience", "unlearning_epochs"), "at least 1", lambda v: v >= 1),
            (("step_size", "cost", "anomaly", "learning_rate"), "positive", lambda v: v > 0),
            (("threshold", "stamped"), "in (0, 1]", lambda v: 0 < v <= 1),
            (("multiplier",), "above 1", lambda v: v > 1),
        )


class Patches(NamedTuple):
    """What the search found for each of C classes."""

    masks: np.ndarray
    """float32 [C, H, W, 1] in [0, 1]."""
    patterns: np.ndarray
    """float32 [C, H, W, c] in [0, 1]."""
    norms: np.ndarray
    """float32 [C], L1 norm of the mask; H W where no mask met the threshold."""

    def shown(self) -> dict[str, np.ndarray]:
        """For the watch: the patches on black, and their classes."""
        return {"recovered": self.masks * self.patterns, "recovered_labels": np.arange(len(self.norms))}


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Search, then unlearn the patches of the suspected classes.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: shuffles them.
    Returns: the variables; the watch is shown them, the suspected classes and the recovered patches.
    """
    patches = search(config, victim, view, jax.random.fold_in(key, 0))
    scores = _scores(config, patches)
    suspected = np.flatnonzero(scores.classes > config.anomaly)
    view.callback.on_detection(scores)
    view.callback.on_round_end(1, victim.variables, suspected=suspected, **patches.shown())
    if len(suspected) == 0:
        return victim.variables
    images, labels = np.array(to_float(view.images)), np.asarray(view.labels)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), len(labels)))
    chosen = order[: max(1, round(config.stamped * len(labels)))]
    which = suspected[np.arange(len(chosen)) % len(suspected)]
    images[chosen] = stamp(images[chosen], patches.masks[which], patches.patterns[which])
    recipe = FitConfig(config.unlearning_epochs, config.batch_size, "sgd", config.learning_rate, 0.9)
    return tune(victim, images, labels, recipe, jax.random.fold_in(key, 2), view.callback, "unlearning", before=1)


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Which class has the outlying patch, by the anomaly index of its mask's norm.

    Args: as of :func:`purify`; the watch is shown the recovered patches.
    """
    patches = search(config, victim, view, jax.random.fold_in(key, 0))
    view.callback.on_round_end(0, victim.variables, **patches.shown())
    return _scores(config, patches)


def search(config: Config, victim: Victim, view: DefenderView, key: Key) -> Patches:
    """The smallest patch of each class, all classes in one program.

    Args: view: clean images (stored [n, H, W, C]); key: shuffles them.
    """
    classes, (height, width, channels) = victim.model.classes, victim.model.shape
    size = max(1, min(config.batch_size, len(view.labels) // 8) // parallel.count()) * parallel.count()
    number = len(view.labels) // size
    shared = {
        "images": jnp.asarray(view.images),
        "variables": dict(victim.variables),
        "rate": jnp.float32(config.step_size),
    }
    moved = {"mask": jnp.ones((classes, height, width, 1)), "pattern": jnp.ones((classes, height, width, channels))}
    state: Any = {"moved": moved, "opt": _ADAM.init(moved)}
    cost = np.full(classes, config.cost, np.float32)
    above, below = np.zeros(classes, int), np.zeros(classes, int)
    best = Patches(
        np.ones((classes, height, width, 1), np.float32),
        np.full((classes, height, width, channels), 0.5, np.float32),
        np.full(classes, height * width, np.float32),
    )
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(view.labels))[: number * size]
        tick = partial(view.callback.on_progress, f"trigger inversion, epoch {epoch + 1} of {config.epochs}")
        split = {"index": order.reshape(number, size)}
        state, metrics = run_epoch(_step(victim.model), state, split, {}, {**shared, "cost": cost}, tick=tick)
        check_finite(metrics["loss"], config.step_size, epoch * number, "loss of the patches", "defense.step_size")
        met = np.asarray(metrics["rate"]).mean(0) >= config.threshold
        mask, pattern = (np.asarray(_unit(state["moved"][name])) for name in ("mask", "pattern"))
        norms = mask.sum((1, 2, 3))
        better = (met & (norms < best.norms))[:, None, None, None]
        best = Patches(
            np.where(better, mask, best.masks),
            np.where(better, pattern, best.patterns),
            np.where(better[:, 0, 0, 0], norms, best.norms),
        )
        above, below = np.where(met, above + 1, 0), np.where(met, 0, below + 1)
        up, down = above >= config.patience, below >= config.patience
        cost = np.where(up, cost * config.multiplier, np.where(down, cost / config.multiplier**1.5, cost))
        cost, above, below = cost.astype(np.float32), np.where(up, 0, above), np.where(down, 0, below)
    return best


def stamp(images: Any, masks: Any, patterns: Any) -> Any:
    """(1 - m) x + m p: images [N, H, W, C], masks [N or 1, H, W, 1], patterns [N or 1, H, W, C]."""
    return (1 - masks) * images + masks * patterns


_ADAM = optax.scale_by_adam(0.5, 0.9)


def _scores(config: Config, patches: Patches) -> Scores:
    index = np.asarray(anomaly_index(-jnp.asarray(patches.norms)))
    target = int(np.argmin(patches.norms))
    return Scores(index, target, float(index[target]), bool(index[target] > config.anomaly))


def _unit(moved: jax.Array) -> jax.Array:
    return jnp.tanh(moved) / (2 + 1e-7) + 0.5


@lru_cache(maxsize=16)
def _step(model: Model) -> Any:
    """One step of Adam for the masks and patterns of all classes."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, goals = to_float(shared["images"][split["index"]]), jnp.arange(model.classes)

        def loss(moved: Any) -> tuple[jax.Array, jax.Array]:
            mask, pattern = _unit(moved["mask"]), _unit(moved["pattern"])
            stamped = jax.vmap(stamp, (None, 0, 0))(images, mask, pattern)
            logits = model.logits(shared["variables"], stamped.reshape(-1, *model.shape))
            logits = logits.reshape(model.classes, len(images), -1)
            wanted = jnp.broadcast_to(goals[:, None], logits.shape[:2])
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean(1)
            rate = (logits.argmax(-1) == wanted).mean(1)
            return (entropy + shared["cost"] * mask.sum((1, 2, 3))).sum(), rate

        (value, rate), gradient = jax.value_and_grad(loss, has_aux=True)(state["moved"])
        value, rate, gradient = parallel.average((value, rate, gradient), axis)
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _ADAM.update(gradient, state["opt"])
        moved = jax.tree.map(lambda p, u: p - shared["rate"] * u, state["moved"], update)
        return {"moved": moved, "opt": opt}, {"loss": value, "rate": rate}

    return step
