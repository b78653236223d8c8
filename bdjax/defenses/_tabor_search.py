"""The search of TABOR: the smallest patch of each class under Neural Cleanse's schedule, with TABOR's regularisers."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import batch_of
from bdjax.detectors._smallest_patches import Patches, SearchConfig, stamp
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import take_step
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Labels, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class RegularisedConfig(SearchConfig):
    """Hyper-parameters of the search, of the decision and of the regularisers."""

    lambda_mask_size: float = 1e-6
    """λ1, weight of R1 for the mask."""
    lambda_pattern_size: float = 1e-5
    """λ2, weight of R1 for the pattern outside the mask."""
    lambda_mask_scatter: float = 1e-7
    """λ3, weight of R2 for the mask."""
    lambda_pattern_scatter: float = 1e-8
    """λ4, weight of R2 for the pattern outside the mask."""
    lambda_blocking: float = 0.0
    """λ5, weight of R3; 0 saves half of the work."""
    lambda_overlaying: float = 1e-2
    """λ6, weight of R4."""
    pixel_scale: float = 255.0
    """Patterns are multiplied by this in R1 and R2, for which the weights are meant; TrojanZoo has 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self, self.part, (_WEIGHTS, "zero or more", lambda v: v >= 0),
            (("pixel_scale",), "positive", lambda v: v > 0),
        )  # fmt: skip


_WEIGHTS = (
    "lambda_mask_size", "lambda_pattern_size", "lambda_mask_scatter", "lambda_pattern_scatter", "lambda_blocking",
    "lambda_overlaying",
)  # fmt: skip
_ADAM = optax.scale_by_adam(0.5, 0.9)


def search(config: RegularisedConfig, victim: Victim, view: DefenderView, key: Key) -> Patches:
    """Search the smallest patch of each class, all classes in one program.

    Args:
      config: the hyper-parameters.
      victim: the model.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the first masks and patterns, and shuffles the images.

    Returns:
      The patches of all classes; a class whose patch never reached the threshold has the norm H W.

    Raises:
      InputError: when there are fewer images than devices, or when the loss becomes NaN or infinite.
    """
    classes, (height, width, channels) = victim.model.classes, victim.model.shape
    size = batch_of(min(config.batch_size, max(len(view.labels) // 8, parallel.count())), len(view.labels))
    steps = len(view.labels) // size
    constants = {
        "images": jnp.asarray(view.images), "labels": jnp.asarray(view.labels), "variables": dict(victim.variables),
        "values": {name: jnp.float32(getattr(config, name)) for name in (*_WEIGHTS, "pixel_scale", "step_size")},
    }  # fmt: skip
    step = _step(victim.model, config.lambda_blocking > 0)
    latent = _first_latent(jax.random.fold_in(key, config.epochs), classes, victim.model.shape)
    state: Any = {"latent": latent, "opt": _ADAM.init(latent)}
    schedule = _CostSchedule(config, classes)
    best = Patches(
        np.ones((classes, height, width, 1), np.float32),
        np.full((classes, height, width, channels), 0.5, np.float32),
        np.full(classes, height * width, np.float32),
    )
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(view.labels))[: steps * size]
        tick = partial(view.callback.on_progress, f"trigger inversion, epoch {epoch + 1} of {config.epochs}")
        batches = {"index": order.reshape(steps, size)}
        state, metrics = run_epoch(step, state, batches, {}, {**constants, "cost": schedule.cost}, tick=tick)
        check_finite(metrics["loss"], config.step_size, epoch * steps, "loss of the patches", "defense.step_size")
        succeeded = np.asarray(metrics["rate"]).mean(0) >= config.threshold
        mask, pattern = (np.asarray(to_unit(state["latent"][name])) for name in ("mask", "pattern"))
        norms = mask.sum((1, 2, 3))
        improved = succeeded & (norms < best.norms)
        chosen = improved[:, None, None, None]
        best = Patches(
            np.where(chosen, mask, best.masks),
            np.where(chosen, pattern, best.patterns),
            np.where(improved, norms, best.norms),
        )
        schedule.update(succeeded)
    return best


def regularisers(
    model: Model, variables: Variables, images: jax.Array, labels: Labels, mask: jax.Array, pattern: jax.Array,
    values: Any, blocking: bool,
) -> jax.Array:  # fmt: skip
    """Compute Σ λ_i R_i of each class.

    Args:
      model: the classifier.
      variables: its variables; evaluation mode.
      images: float32 [N, H, W, C] in [0, 1].
      labels: int32 [N].
      mask: m, float32 [P, H, W, 1] in [0, 1], of the classes 0 to P - 1.
      pattern: Δ, float32 [P, H, W, C] in [0, 1].
      values: the weights and `pixel_scale` by their names in the Config.
      blocking: whether R3 is computed.

    Returns:
      float32 [P].
    """
    outside = values["pixel_scale"] * (1 - mask) * pattern
    entropy = optax.softmax_cross_entropy_with_integer_labels
    total = values["lambda_mask_size"] * _size(mask) + values["lambda_pattern_size"] * _size(outside)
    total += values["lambda_mask_scatter"] * _scatter(mask) + values["lambda_pattern_scatter"] * _scatter(outside)
    total += values["lambda_overlaying"] * entropy(model.logits(variables, mask * pattern), jnp.arange(len(mask)))
    if blocking:
        remaining = (1 - mask)[:, None] * images
        logits = model.logits(variables, remaining.reshape(-1, *model.shape)).reshape(len(mask), len(images), -1)
        total += values["lambda_blocking"] * entropy(logits, jnp.broadcast_to(labels, logits.shape[:2])).mean(1)
    return total


def to_unit(latent: jax.Array) -> jax.Array:
    """Map unconstrained values to (0, 1)."""
    return jnp.tanh(latent) / (2 + 1e-7) + 0.5


class _CostSchedule:
    """λ of each class, raised while its patch succeeds and lowered while it does not."""

    def __init__(self, config: SearchConfig, classes: int) -> None:
        self._config = config
        self.cost = np.full(classes, config.cost, np.float32)
        self._above, self._below = np.zeros(classes, int), np.zeros(classes, int)

    def update(self, succeeded: np.ndarray) -> None:
        """Count an epoch, and change λ where `patience` consecutive ones agree."""
        config = self._config
        self._above, self._below = np.where(succeeded, self._above + 1, 0), np.where(succeeded, 0, self._below + 1)
        up, down = self._above >= config.patience, self._below >= config.patience
        factor = np.where(up, config.multiplier, np.where(down, config.multiplier**-1.5, 1))
        self.cost = (self.cost * factor).astype(np.float32)
        self._above, self._below = np.where(up, 0, self._above), np.where(down, 0, self._below)


def _first_latent(key: Key, classes: int, shape: tuple[int, int, int]) -> dict[str, jax.Array]:
    """Masks and patterns of uniformly random values in (0, 1), before the hyperbolic tangent."""
    shapes = {"mask": (classes, *shape[:2], 1), "pattern": (classes, *shape)}
    return {
        name: jnp.arctanh((jax.random.uniform(jax.random.fold_in(key, index), size) - 0.5) * 1.999)
        for index, (name, size) in enumerate(shapes.items())
    }


def _size(x: jax.Array) -> jax.Array:
    """R1 of [P, H, W, C] >= 0: sum plus sum of squares, [P]."""
    return (x + x**2).sum((1, 2, 3))


def _scatter(x: jax.Array) -> jax.Array:
    """R2 of [P, H, W, C]: sum of the squared differences of neighbouring rows and columns, [P]."""
    return sum((jnp.diff(x, axis=axis) ** 2).sum((1, 2, 3)) for axis in (1, 2))  # type: ignore[return-value]


@lru_cache(maxsize=16)
def _step(model: Model, blocking: bool) -> Any:
    """Return one step of Adam on the masks and patterns of all classes, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]
        variables, values = constants["variables"], constants["values"]

        def objective(latent: Any) -> tuple[jax.Array, jax.Array]:
            mask, pattern = to_unit(latent["mask"]), to_unit(latent["pattern"])
            stamped = jax.vmap(stamp, (None, 0, 0))(images, mask, pattern)
            logits = model.logits(variables, stamped.reshape(-1, *model.shape))
            logits = logits.reshape(model.classes, len(images), -1)
            goals = jnp.broadcast_to(jnp.arange(model.classes)[:, None], logits.shape[:2])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, goals).mean(1)
            loss += constants["cost"] * mask.sum((1, 2, 3))
            loss += regularisers(model, variables, images, labels, mask, pattern, values, blocking)
            return loss.sum(), (logits.argmax(-1) == goals).mean(1)

        (loss, rate), gradient = jax.value_and_grad(objective, has_aux=True)(state["latent"])
        loss, rate, gradient = parallel.average((loss, rate, gradient), axis)
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _ADAM.update(gradient, state["opt"])
        latent = take_step(state["latent"], update, values["step_size"])
        return {"latent": latent, "opt": opt}, {"loss": loss, "rate": rate}

    return step
