"""FT-SAM: fine-tune with adaptive sharpness-aware minimisation.

M. Zhu, S. Wei, L. Shen, Y. Fan and B. Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization", ICCV 2023, arXiv:2304.11823.

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Each step first ascends the loss in proportion to the magnitude of each weight, which shrinks the large weights of
backdoor-related neurons:

    g = ∂/∂θ mean CE(f_θ(x), y),     e = ρ θ² ⊙ g / (‖ |θ| ⊙ g ‖_2 + 1e-12)
    θ <- θ - η ∂/∂θ mean CE(f_{θ+e}(x), y)

The norm is taken over all parameters together; `adaptive=False` is plain SAM, e = ρ g / (‖g‖_2 + 1e-12). BatchNorm
statistics are updated by the first pass only. The steps are those of `optax.contrib.sam`. The defaults are those of
BackdoorBench, by the same group, for CIFAR-10: ρ = 2, label smoothing 0.1 (spread over the other classes), SGD at 0.01
with momentum 0.9 and weight decay 5e-4, batches of 256, 100 epochs. For GTSRB and Tiny ImageNet it uses ρ = 8 and no
smoothing, for GTSRB 50 epochs.

`cosine` offers both readings of the schedule. The release steps a cosine with T_max = 100 once per *batch*: the rate
decreases to zero in 100 batches, increases in the next 100, and so on ("batches"). The intended schedule, which other
reimplementations use, is one cosine over all epochs ("epochs"). The two are different methods.

Deviations:
- The release evaluates on triggered images after each epoch, which has no effect on the result. This is left out, as
  are its gradient decomposition (α = 0) and its schedule of ρ (constant).
- Images are cropped but not flipped (`augment=crop_flip` does both, as the release does on CIFAR-10).
- Every epoch is divided into batches of equal size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._tuning import (
    equal_batches,
    hyper_arrays,
    image_arrays,
    round_reporter,
    run_epochs,
    training_state,
    variables_of,
)
from bdjax.engine import augment, parallel
from bdjax.engine.optimizer import take_step
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The recipe of fine-tuning."""

    epochs: int = 100
    """Passes over the clean images."""
    batch_size: int = 256
    """Images per step, at most."""
    rho: float = 2.0
    """ρ, the L2 length of the ascent step e (adaptive: of e / |θ|)."""
    adaptive: bool = True
    """Scale the ascent step by the magnitude of each weight."""
    smoothing: float = 0.1
    """Label smoothing: probability mass spread evenly over the other classes, in [0, 1)."""
    learning_rate: float = 0.01
    """Learning rate of SGD at the first step."""
    cosine: Literal["batches", "epochs", "off"] = "batches"
    """Schedule of the learning rate: "batches", a cosine that decreases and increases periodically (the release);
    "epochs", one cosine that decreases to zero over all epochs; "off", constant."""
    half_period: int = 100
    """Number of batches in which the cosine of "batches" decreases to zero."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """Coefficient of the L2 term added to the gradient of the second pass."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size", "half_period"), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("rho", "weight_decay"), "zero or more", lambda v: v >= 0),
            (("smoothing", "momentum"), "in [0, 1)", lambda v: 0 <= v < 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Fine-tune the victim on clean images with sharpness-aware steps.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the variables and the loss after
        each epoch.
      key: random key that shuffles and augments the images.

    Returns:
      The purified variables.

    Raises:
      InputError: when the batch size or the number of images is smaller than the number of devices, or when the loss
        becomes NaN or infinite.
    """
    number, size = equal_batches(config.batch_size, len(view.labels))
    constants: dict[str, Any] = {
        **image_arrays(view.images, view.labels),
        "hyper": hyper_arrays(config, _DYNAMIC),
    }
    state = training_state(victim.variables, "sgd")
    state["opt"] = _sam(constants["hyper"], config.adaptive, None).init(state["params"])

    state = run_epochs(
        _step(victim.model, config.augment, config.adaptive), state, constants, learning_rates(config, number), size,
        key, partial(view.callback.on_progress, "FT-SAM"), round_reporter(view.callback),
    )  # fmt: skip
    return variables_of(state)


def learning_rates(config: Config, number: int) -> np.ndarray:
    """Return the learning rate of every step, float32 [epochs, number], with `number` batches per epoch."""
    step = np.arange(config.epochs * number).reshape(config.epochs, number)
    if config.cosine == "batches":
        phase = step / config.half_period
    elif config.cosine == "epochs":
        phase = step // number / config.epochs
    else:
        phase = np.zeros(step.shape)
    return np.asarray(config.learning_rate * (1 + np.cos(np.pi * phase)) / 2, np.float32)


def ascent_step(params: Any, gradient: Any, rho: Any, adaptive: bool) -> Any:
    """Return the perturbation e of the parameters.

    Args:
      params: the parameters θ.
      gradient: the gradient g at θ, a pytree like the parameters.
      rho: ρ, length of the step.
      adaptive: whether the step is scaled by the magnitude of the parameters.

    Returns:
      A pytree like the parameters.
    """
    size = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, params)
    scaled = jax.tree.map(jnp.multiply, size, gradient)
    length = optax.tree.norm(scaled)
    return jax.tree.map(lambda a, s: rho * a * s / (length + 1e-12), size, scaled)


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: Any) -> jax.Array:
    """Mean cross-entropy with label smoothing.

    Args:
      logits: [N, classes].
      labels: int32 [N].
      smoothing: probability mass that is spread evenly over the other classes; the label gets the rest.

    Returns:
      float32 scalar.
    """
    classes = logits.shape[-1]
    one_hot = jax.nn.one_hot(labels, classes)
    targets = one_hot * (1 - smoothing) + (1 - one_hot) * smoothing / (classes - 1)
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()


_DYNAMIC = ("rho", "smoothing", "momentum", "weight_decay")


def _sam(hyper: Any, adaptive: bool, axis: str | None) -> optax.GradientTransformationExtraArgs:
    """Return Optax's SAM with both passes in one update, which must be multiplied by the learning rate."""

    def uphill(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.negative, ascent_step(params, gradient, hyper["rho"], adaptive)), state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), uphill)
    outer = optax.chain(optax.add_decayed_weights(hyper["weight_decay"]), optax.trace(hyper["momentum"]))
    return optax.contrib.sam(outer, inner, sync_period=2, opaque_mode=True, batch_axis_name=axis)


@lru_cache(maxsize=16)
def _step(model: Model, policy: str, adaptive: bool) -> Callable:
    """Return a step of both passes in the engine's form."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels = constants["labels"][batch["index"]]

        def loss(params: Any, keys: Key) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, _, stats = model.apply(variables, images, True, keys, axis)
            return smoothed_cross_entropy(logits, labels, constants["hyper"]["smoothing"]), stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"], batch["dropout"])
        value, gradient = parallel.average((value, gradient), axis)
        # other dropout masks in the second pass
        second_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(batch["dropout"])

        def second_gradient(params: Any, _: int) -> Any:
            return jax.grad(loss, has_aux=True)(params, second_keys)[0]

        with jax.numpy_dtype_promotion("standard"):  # optax mixes Python floats with arrays
            update, opt = _sam(constants["hyper"], adaptive, axis).update(
                gradient, state["opt"], state["params"], grad_fn=second_gradient
            )
        params = take_step(state["params"], update, per_step["rate"])
        return {"params": params, "batch_stats": stats, "opt": opt}, {"loss": value}

    return step
