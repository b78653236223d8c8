"""DeepInspect: recover a trigger for each class by a generator, detect the outlier, and unlearn its trigger.

H. Chen, C. Fu, J. Zhao and F. Koushanfar, "DeepInspect: A Black-box Trojan Detection and Mitigation Framework for Deep
Neural Networks", IJCAI 2019. This is a reproduction after TrojanZoo (R. Pang, Z. Zhang, X. Gao, Z. Xi, S. Ji, P. Cheng
and T. Wang, "TrojanZoo: Towards Unified, Holistic, and Practical Evaluation of Neural Backdoors", EuroS&P 2022,
arXiv:2012.09302): the authors published no code and not all constants.

Threat model: the defender has the model and clean labelled images, but no trigger. The paper's defender has no images
and inverts the model; I-BAU's comparison gives DeepInspect clean images, as here.

For every class t, a generator G_t maps a noise vector z, drawn once, to a perturbation, and is trained by Adam on

    mean CE(f(clip(x + G_t(z), 0, 1)), t) + γ2 ‖G_t(z)‖₁

The class loss is the mean over the last twentieth of the steps. A class is suspected when the anomaly index of its loss
(the distance below the median in units of 1.4826 median absolute deviations) exceeds `anomaly`. All classes are trained
in one program. Unlearning fine-tunes on the clean images, a share of which carries the perturbation of a suspected
class with the true label. Without a suspected class the model is returned unchanged.

Deviations:

- γ1 = 0, as in TrojanZoo: there is no discriminator. γ2 = 0.02, the learning rate 0.01, 100 noise values and 1,000
  steps (20 epochs of a tenth of CIFAR-10) are TrojanZoo's.
- The generator is :func:`bdjax.models.sampler` without batch statistics. TrojanZoo's has a dense layer of 64 H W units
  (55 million weights on 28x28 pixels) and two transposed convolutions, and receives the label, which is constant,
  because each class has its own generator there, too.
- The perturbation is added and clipped, as in the paper; in TrojanZoo it takes the image's place.
- All steps draw their images with replacement, and all classes see the same ones.
- The paper's test has two sides (double median absolute deviation); only small losses are suspect here.
- The unlearning has the constants of `neural_cleanse`; the paper has none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.defenses._batch import batch_of
from bdjax.defenses._patch_unlearning import unlearn_triggers
from bdjax.engine import FitConfig, parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, take_step
from bdjax.errors import check_fields
from bdjax.metrics import anomaly_index
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The generators, the detection and the unlearning."""

    iterations: int = 1000
    """Steps of Adam on the generators."""
    batch_size: int = 32
    """Images per step and class, at most."""
    generator_rate: float = 0.01
    """Learning rate of the generators."""
    gamma: float = 0.02
    """γ2, weight of the L1 norm of a perturbation, whose pixels are in [0, 1]."""
    noise_size: int = 100
    """Length of the noise vector; a multiple of 4."""
    hidden: int = 256
    """Units of the generators' hidden layers."""
    anomaly: float = 2.0
    """Anomaly index above which a class is suspected; positive."""
    unlearning_epochs: int = 10
    """Epochs of the fine-tuning."""
    unlearning_batch: int = 256
    """Images per step of the fine-tuning, at most."""
    stamped: float = 0.2
    """Fraction of the images that carry a recovered perturbation in the fine-tuning, in (0, 1]."""
    learning_rate: float = 0.01
    """Learning rate of the fine-tuning, SGD with momentum 0.9."""

    def __post_init__(self) -> None:
        counts = ("iterations", "batch_size", "hidden", "unlearning_epochs", "unlearning_batch")
        check_fields(
            self,
            "defense",
            (counts, "at least 1", lambda v: v >= 1),
            (("generator_rate", "anomaly", "learning_rate"), "positive", lambda v: v > 0),
            (("gamma",), "zero or more", lambda v: v >= 0),
            (("noise_size",), "a positive multiple of 4", lambda v: v > 0 and v % 4 == 0),
            (("stamped",), "in (0, 1]", lambda v: 0 < v <= 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Recover a perturbation for each class and unlearn those of the suspected classes.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the scores, then the variables, the
        suspected classes and the recovered perturbations.
      key: draws the generators, the noise and the batches, and the images that carry a perturbation.

    Returns:
      The cleaned variables; those of the victim when no class is suspected.

    Raises:
      InputError: when there are fewer images than devices, or when a loss becomes NaN or infinite.
    """
    deltas, losses = recover(config, victim, view, jax.random.fold_in(key, 0))
    index = np.asarray(anomaly_index(-jnp.asarray(losses)))
    target = int(np.argmin(losses))
    suspected = np.flatnonzero(index > config.anomaly)
    view.callback.on_detection(Scores(index, target, float(index[target]), bool(index[target] > config.anomaly)))
    view.callback.on_round_end(
        1, victim.variables, suspected=suspected, recovered=deltas, recovered_labels=np.arange(len(deltas))
    )  # fmt: skip
    if len(suspected) == 0:
        return victim.variables
    recipe = FitConfig(config.unlearning_epochs, config.unlearning_batch, "sgd", config.learning_rate, 0.9)
    chosen = deltas[suspected]
    return unlearn_triggers(
        victim, view, lambda images, turn: np.clip(images + chosen[turn], 0, 1), len(chosen), config.stamped, recipe,
        jax.random.fold_in(key, 1), before=1,
    )  # fmt: skip


def recover(config: Config, victim: Victim, view: DefenderView, key: Key) -> tuple[np.ndarray, np.ndarray]:
    """Train the generators of all classes.

    Args:
      config: the hyper-parameters.
      victim: the model.
      view: clean images and labels; its callback receives the progress.
      key: draws the generators, the noise and the batches.

    Returns:
      (perturbations, float32 [C, H, W, c] in [0, 1]; losses, float32 [C]).

    Raises:
      InputError: when there are fewer images than devices, or when the loss becomes NaN or infinite.
    """
    model, keys = victim.model, jax.random.split(key, 3)
    size = batch_of(config.batch_size, len(view.labels))
    net = models.sampler(int(np.prod(model.shape)), config.noise_size, config.hidden)
    variables = jax.vmap(net.init)(jax.random.split(keys[0], model.classes))
    constants = {
        "images": jnp.asarray(view.images),
        "victim": dict(victim.variables),
        "stats": variables["batch_stats"],
        "noise": jax.random.uniform(keys[1], (1, config.noise_size)),
        "gamma": jnp.float32(config.gamma),
        "rate": jnp.float32(config.generator_rate),
    }
    params = variables["params"]
    state: Any = {"params": params, "opt": direction("adam").init(params)}
    batches = {"index": jax.random.randint(keys[2], (config.iterations, size), 0, len(view.labels))}
    tick = partial(view.callback.on_progress, "trigger recovery")
    state, metrics = run_epoch(_step(model, net), state, batches, {}, constants, tick=tick)
    check_finite(metrics["loss"].sum(1), config.generator_rate, 0, "loss of the generators", "defense.generator_rate")
    deltas = _perturbations(net, model.shape, state["params"], constants["stats"], constants["noise"])
    return np.asarray(deltas), np.asarray(metrics["loss"])[-max(1, config.iterations // 20) :].mean(0)


def class_losses(model: Model, variables: Variables, images: jax.Array, deltas: jax.Array, gamma: Any) -> jax.Array:
    """Compute the loss of every class.

    Args:
      model: the classifier.
      variables: its variables; evaluation mode.
      images: float32 [N, H, W, C] in [0, 1].
      deltas: perturbations, float32 [P, H, W, C], of the classes 0 to P - 1.
      gamma: γ2.

    Returns:
      float32 [P].
    """
    perturbed = jnp.clip(images[None] + deltas[:, None], 0, 1)
    logits = model.logits(variables, perturbed.reshape(-1, *model.shape)).reshape(*perturbed.shape[:2], -1)
    goals = jnp.broadcast_to(jnp.arange(len(deltas))[:, None], perturbed.shape[:2])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, goals).mean(1)
    return entropy + gamma * jnp.abs(deltas).sum((1, 2, 3))


@partial(jax.jit, static_argnums=(0, 1))
def _perturbations(
    net: models.Generator, shape: tuple[int, int, int], params: Any, stats: Any, noise: jax.Array
) -> jax.Array:
    """Return the output of every class's generator, float32 [P, H, W, C]."""
    outputs = jax.vmap(lambda p, s: net.apply({"params": p, "batch_stats": s}, noise)[0])(params, stats)
    return outputs.reshape(-1, *shape)


@lru_cache(maxsize=16)
def _step(model: Model, net: models.Generator) -> Callable:
    """Return one step of Adam on the generators of all classes, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = to_float(constants["images"][batch["index"]])

        def objective(params: Any) -> tuple[jax.Array, jax.Array]:
            deltas = _perturbations(net, model.shape, params, constants["stats"], constants["noise"])
            losses = class_losses(model, constants["victim"], images, deltas, constants["gamma"])
            return losses.sum(), losses

        gradient, losses = jax.grad(objective, has_aux=True)(state["params"])
        gradient, losses = parallel.average((gradient, losses), axis)
        update, opt = direction("adam").update(gradient, state["opt"])
        return {"params": take_step(state["params"], update, constants["rate"]), "opt": opt}, {"loss": losses}

    return step
