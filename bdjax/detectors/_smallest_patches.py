"""The search of Neural Cleanse for the smallest patch of each class, for its detector and its defense."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import take_step
from bdjax.errors import check_fields
from bdjax.metrics import anomaly_index
from bdjax.types import DefenderView, Key, Model, Scores, Victim, to_float


@dataclass(frozen=True)
class SearchConfig:
    """Hyper-parameters of the search and of the decision."""

    part: ClassVar[str] = "detector"
    """How the fields are called in messages."""
    epochs: int = 80
    """Passes over the clean images in the search."""
    batch_size: int = 256
    """Images per step and class, at most an eighth of all images."""
    step_size: float = 0.1
    """Learning rate of Adam (betas 0.5 and 0.9) for mask and pattern."""
    threshold: float = 0.98
    """Fraction of the images that a patch must send to its class, in (0, 1]."""
    cost: float = 1e-3
    """Initial λ; positive."""
    multiplier: float = 2.0
    """Factor by which λ is changed; above 1."""
    patience: int = 5
    """Consecutive epochs after which λ is changed."""
    anomaly: float = 2.0
    """Anomaly index above which a class is suspected; positive."""
    schedule: Literal["bench", "original"] = "bench"
    """bench: λ is `cost` from the first step on, as in BackdoorBench; original: masks and patterns start at random
    values, and λ is 0 until the patch has reached the threshold in `patience` consecutive epochs, as in the authors'
    code."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            self.part,
            (("epochs", "batch_size", "patience"), "at least 1", lambda v: v >= 1),
            (("step_size", "cost", "anomaly"), "positive", lambda v: v > 0),
            (("threshold",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("multiplier",), "above 1", lambda v: v > 1),
        )


class Patches(NamedTuple):
    """Result of the search: the smallest patch of each of C classes."""

    masks: np.ndarray
    """float32 [C, H, W, 1] in [0, 1]."""
    patterns: np.ndarray
    """float32 [C, H, W, c] in [0, 1]."""
    norms: np.ndarray
    """float32 [C], L1 norm of each mask; H W where no mask reached the threshold."""

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Return the patches on a black background and their classes, as arrays for a callback."""
        return {"recovered": self.masks * self.patterns, "recovered_labels": np.arange(len(self.norms))}


def search(config: SearchConfig, victim: Victim, view: DefenderView, key: Key) -> Patches:
    """Search the smallest patch of each class, all classes in one program.

    Args:
      config: the hyper-parameters.
      victim: the model.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: shuffles the images.

    Returns:
      The patches of all classes.
    """
    classes, (height, width, channels) = victim.model.classes, victim.model.shape
    batch_size = max(1, min(config.batch_size, len(view.labels) // 8) // parallel.count()) * parallel.count()
    steps = len(view.labels) // batch_size
    constants = {
        "images": jnp.asarray(view.images),
        "variables": dict(victim.variables),
        "rate": jnp.float32(config.step_size),
    }
    latent = _initial_latent(config, classes, (height, width, channels), jax.random.fold_in(key, config.epochs))
    state: Any = {"latent": latent, "opt": _ADAM.init(latent)}
    cost = np.full(classes, config.cost if config.schedule == "bench" else 0, np.float32)
    epochs_above, epochs_below = np.zeros(classes, int), np.zeros(classes, int)
    best = Patches(
        np.ones((classes, height, width, 1), np.float32),
        np.full((classes, height, width, channels), 0.5, np.float32),
        np.full(classes, height * width, np.float32),
    )
    for epoch in range(config.epochs):
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), len(view.labels))[: steps * batch_size]
        tick = partial(view.callback.on_progress, f"trigger inversion, epoch {epoch + 1} of {config.epochs}")
        batches = {"index": shuffled.reshape(steps, batch_size)}
        state, metrics = run_epoch(_step(victim.model), state, batches, {}, {**constants, "cost": cost}, tick=tick)
        check_finite(
            metrics["loss"], config.step_size, epoch * steps, "loss of the patches", f"{config.part}.step_size"
        )
        succeeded = np.asarray(metrics["rate"]).mean(0) >= config.threshold
        mask, pattern = (np.asarray(_to_unit(state["latent"][name])) for name in ("mask", "pattern"))
        norms = mask.sum((1, 2, 3))
        improved = (succeeded & (norms < best.norms))[:, None, None, None]
        best = Patches(
            np.where(improved, mask, best.masks),
            np.where(improved, pattern, best.patterns),
            np.where(improved[:, 0, 0, 0], norms, best.norms),
        )
        epochs_above, epochs_below = np.where(succeeded, epochs_above + 1, 0), np.where(succeeded, 0, epochs_below + 1)
        increase, decrease = epochs_above >= config.patience, epochs_below >= config.patience
        raised = np.where(cost == 0, config.cost, cost * config.multiplier)
        cost = np.where(increase, raised, np.where(decrease, cost / config.multiplier**1.5, cost)).astype(np.float32)
        epochs_above, epochs_below = np.where(increase, 0, epochs_above), np.where(decrease, 0, epochs_below)
    return best


def stamp(images: Any, masks: Any, patterns: Any) -> Any:
    """Stamp patches on images: (1 - m) x + m p.

    Args:
      images: float32 [N, H, W, C] in [0, 1].
      masks: float32 [N or 1, H, W, 1] in [0, 1].
      patterns: float32 [N or 1, H, W, C] in [0, 1].

    Returns:
      The stamped images, float32 [N, H, W, C].
    """
    return (1 - masks) * images + masks * patterns


_ADAM = optax.scale_by_adam(0.5, 0.9)


def patch_scores(config: SearchConfig, patches: Patches) -> Scores:
    """Score each class by the anomaly index of its patch's norm."""
    index = np.asarray(anomaly_index(-jnp.asarray(patches.norms)))
    target = int(np.argmin(patches.norms))
    return Scores(index, target, float(index[target]), bool(index[target] > config.anomaly))


def _initial_latent(
    config: SearchConfig, classes: int, shape: tuple[int, int, int], key: Key
) -> dict[str, jax.Array]:  # fmt: skip
    """Masks and patterns before the hyperbolic tangent: ones, or of uniformly random values in (0, 1)."""
    shapes = {"mask": (classes, *shape[:2], 1), "pattern": (classes, *shape)}
    if config.schedule == "bench":
        return {name: jnp.ones(size) for name, size in shapes.items()}
    return {
        name: jnp.arctanh((jax.random.uniform(jax.random.fold_in(key, place), size) - 0.5) * 1.999)
        for place, (name, size) in enumerate(shapes.items())
    }


def _to_unit(latent: jax.Array) -> jax.Array:
    """Map unconstrained values to (0, 1)."""
    return jnp.tanh(latent) / (2 + 1e-7) + 0.5


@lru_cache(maxsize=16)
def _step(model: Model) -> Any:
    """Return one step of Adam on the masks and patterns of all classes, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, goals = to_float(constants["images"][batch["index"]]), jnp.arange(model.classes)

        def objective(latent: Any) -> tuple[jax.Array, jax.Array]:
            mask, pattern = _to_unit(latent["mask"]), _to_unit(latent["pattern"])
            stamped = jax.vmap(stamp, (None, 0, 0))(images, mask, pattern)
            logits = model.logits(constants["variables"], stamped.reshape(-1, *model.shape))
            logits = logits.reshape(model.classes, len(images), -1)
            target_labels = jnp.broadcast_to(goals[:, None], logits.shape[:2])
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target_labels).mean(1)
            rate = (logits.argmax(-1) == target_labels).mean(1)
            return (entropy + constants["cost"] * mask.sum((1, 2, 3))).sum(), rate

        (loss_value, rate), gradient = jax.value_and_grad(objective, has_aux=True)(state["latent"])
        loss_value, rate, gradient = parallel.average((loss_value, rate, gradient), axis)
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _ADAM.update(gradient, state["opt"])
        latent = take_step(state["latent"], update, constants["rate"])
        return {"latent": latent, "opt": opt}, {"loss": loss_value, "rate": rate}

    return step
