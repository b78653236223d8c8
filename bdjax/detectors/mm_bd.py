"""MM-BD: detect a backdoor, without any image, by the largest margin that each class can reach.

H. Wang, Z. Xiang, D. J. Miller and G. Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE Symposium on Security and Privacy 2024,
arXiv:2205.06900.

Threat model: the auditor has the model alone: no image and no trigger.

For every class c, inputs z in the box [0, 1]^(H x W x C) ascend the margin of the class,

    r_c = max_z [f_c(z) − max_{k≠c} f_k(z)],

from `images` random starts each. A backdoor makes the margin of its target class unusually large, because training
fits the trigger beyond what the class itself needs. The p-value of a class compares log r_c with the other classes
(:func:`bdjax.metrics.outlier_p_values`).

Deviations:

- `optimizer="release"` is gradient descent as in the authors' code, where the optimiser is made anew in every step, so
  that its momentum has no effect; 30 starts, 300 steps and a learning rate of 0.01 are theirs. The default is Adam,
  which converges in fewer steps (ours).
- The null distribution is a log-normal one, for which the p-value is exact, in place of a Gamma distribution that is
  fitted to C − 1 values (ours).
- All classes run in one program for a fixed number of steps; the release stops each class on its own.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import images_per_goal
from bdjax.detectors._evidence import FREEDOM_WITHOUT_IMAGES, LARGEST_LEVEL, scores_of
from bdjax.engine import parallel, run_epoch
from bdjax.errors import check_fields
from bdjax.metrics import Prior
from bdjax.types import DefenderView, Key, Model, Scores, Victim

NEEDS_IMAGES = False


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the ascent and of the decision."""

    images: int = 8
    """Random starts per class, with ten classes or fewer; with more classes fewer, at least 5."""
    steps: int = 80
    """Steps of the ascent."""
    optimizer: Literal["adam", "release"] = "adam"
    """Adam, or gradient descent without momentum as in the authors' code."""
    learning_rate: float = 0.05
    """Step size, in pixel values of [0, 1]; positive. The release has 0.01."""
    deviation: float = 0.2
    """Typical standard deviation of log r_c between the classes of a clean model, the prior of the measured one;
    positive. Chosen on 39 clean models (experiments/results/audit)."""
    level: float = 0.05
    """A class is accused when the p-value of the model is at most this, in (0, 0.3]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("images", "steps"), "at least 1", lambda v: v >= 1),
            (("learning_rate", "deviation"), "positive", lambda v: v > 0),
            (("level",), f"in (0, {LARGEST_LEVEL}]", lambda v: 0 < v <= LARGEST_LEVEL),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Compare the largest margins of the classes.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: its images are not used. Its callback receives the inputs with the largest margins.
      key: draws the random starts.

    Returns:
      For each class the logarithm of its largest margin relative to the median, with p-values.
    """
    margins, inputs = largest_margins(config, victim, view, key)
    prior = Prior(config.deviation, FREEDOM_WITHOUT_IMAGES)
    scores = scores_of(np.log(np.maximum(margins, 1e-6)), config.level, prior)
    nearest = np.argsort(-margins, kind="stable")[:3]
    view.callback.on_round_end(0, victim.variables, recovered=inputs[nearest], recovered_labels=nearest)
    return scores


def largest_margins(
    config: Config, victim: Victim, view: DefenderView, key: Key
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Ascend the margin of every class.

    Args:
      config: the hyper-parameters.
      victim: the model.
      view: its callback receives the progress.
      key: draws the random starts.

    Returns:
      The largest margin of each class in logits, float32 [C]; the inputs that reach them, float32 [C, H, W, c].
    """
    model = victim.model
    starts = -(-images_per_goal(config.images, model.classes) // parallel.count()) * parallel.count()
    state: Any = {"inputs": jax.random.uniform(key, (model.classes, starts, *model.shape))}
    state["opt"] = _direction(config.optimizer).init(state["inputs"])
    constants = {"variables": dict(victim.variables), "rate": jnp.float32(config.learning_rate)}
    batches = {"step": jnp.zeros((config.steps, parallel.count()))}  # nothing but the number of steps
    tick = partial(view.callback.on_progress, "largest margin of every class")
    state = run_epoch(_step(model, config.optimizer), state, batches, {}, constants, tick=tick)[0]
    margins = np.asarray(jax.jit(partial(_margins, model))(victim.variables, state["inputs"]))
    best = margins.argmax(1)
    inputs = np.clip(np.asarray(state["inputs"]), 0, 1)
    return margins.max(1), inputs[np.arange(model.classes), best]


def _margins(model: Model, variables: Any, inputs: jax.Array) -> jax.Array:
    """Margin of class c at its inputs, [C, B, H, W, c] -> [C, B]."""
    logits = model.logits(variables, jnp.clip(inputs, 0, 1).reshape(-1, *model.shape)).reshape(*inputs.shape[:2], -1)
    is_class = jnp.eye(model.classes, dtype=bool)[:, None]
    return jnp.where(is_class, logits, -jnp.inf).max(-1) - jnp.where(is_class, -jnp.inf, logits).max(-1)


def _direction(optimizer: str) -> optax.GradientTransformation:
    return optax.scale_by_adam() if optimizer == "adam" else optax.identity()


@lru_cache(maxsize=16)
def _step(model: Model, optimizer: str) -> Any:
    """Return one step of the ascent for all classes, in the engine's form; every device takes the same step."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        gradient = jax.grad(lambda inputs: -_margins(model, constants["variables"], inputs).sum())(state["inputs"])
        with jax.numpy_dtype_promotion("standard"):
            update, opt = _direction(optimizer).update(gradient, state["opt"])
        return {"inputs": state["inputs"] - constants["rate"] * update, "opt": opt}, {}

    return step
