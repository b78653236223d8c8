"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation (Zhu et al., ICCV 2023).

M. Zhu, S. Wei, L. Shen, Y. Fan and B. Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization".

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
falls to zero in 100 batches, rises again in the next 100, and so on ("batches"). The intended schedule, which other
reimplementations use, is one cosine over all epochs ("epochs"). The two are different methods.

**Deviations** from the release: its evaluation on triggered images after each epoch has no effect on the result and is
left out, as are its gradient decomposition (α = 0) and its schedule of ρ (constant). Images are cropped but not flipped
(`augment=crop_flip` does both, as the release on CIFAR-10). Every epoch is divided into batches of equal size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._tuning import begin, equal_batches, model_of, passes, shown_to
from bdjax.engine import augment, parallel
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
    """Schedule of the learning rate: "batches", a cosine that falls and rises periodically (the release); "epochs", one
    cosine that falls to zero over all epochs; "off", constant."""
    half_period: int = 100
    """Number of batches in which the cosine of "batches" falls to zero."""
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

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: shuffles and augments them.
    Returns: the variables; the watch is shown them and the loss after each epoch.
    Raises InputError for fewer images than devices, and for a loss that is not finite.
    """
    number, size = equal_batches(config.batch_size, len(view.labels))
    shared: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
    }
    state = begin(victim.variables, "sgd")
    state["opt"] = _sam(shared["hyper"], config.adaptive, None).init(state["params"])

    state = passes(
        _step(victim.model, config.augment, config.adaptive), state, shared, rates(config, number), size, key,
        partial(view.callback.on_progress, "FT-SAM"), shown_to(view.callback),
    )  # fmt: skip
    return model_of(state)


def rates(config: Config, number: int) -> np.ndarray:
    """Learning rate of every step, float32 [epochs, number], with `number` batches per epoch."""
    step = np.arange(config.epochs * number).reshape(config.epochs, number)
    if config.cosine == "batches":
        phase = step / config.half_period
    elif config.cosine == "epochs":
        phase = step // number / config.epochs
    else:
        phase = np.zeros(step.shape)
    return np.asarray(config.learning_rate * (1 + np.cos(np.pi * phase)) / 2, np.float32)


def ascent(params: Any, gradient: Any, rho: Any, adaptive: bool) -> Any:
    """The perturbation e, a pytree like the parameters."""
    size = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, params)
    scaled = jax.tree.map(jnp.multiply, size, gradient)
    length = optax.tree.norm(scaled)
    return jax.tree.map(lambda a, s: rho * a * s / (length + 1e-12), size, scaled)


def smoothed(logits: jax.Array, labels: jax.Array, smoothing: Any) -> jax.Array:
    """Mean cross-entropy with label smoothing: 1 - smoothing on the label, the rest spread over the other classes."""
    classes = logits.shape[-1]
    hot = jax.nn.one_hot(labels, classes)
    wanted = hot * (1 - smoothing) + (1 - hot) * smoothing / (classes - 1)
    return -(wanted * jax.nn.log_softmax(logits)).sum(-1).mean()


_DYNAMIC = ("rho", "smoothing", "momentum", "weight_decay")


def _sam(hyper: Any, adaptive: bool, axis: str | None) -> optax.GradientTransformationExtraArgs:
    """Optax's SAM, with both passes in one update; the update is to be multiplied by the learning rate."""

    def uphill(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.negative, ascent(params, gradient, hyper["rho"], adaptive)), state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), uphill)
    outer = optax.chain(optax.add_decayed_weights(hyper["weight_decay"]), optax.trace(hyper["momentum"]))
    return optax.contrib.sam(outer, inner, sync_period=2, opaque_mode=True, batch_axis_name=axis)


@lru_cache(maxsize=16)
def _step(model: Model, policy: str, adaptive: bool) -> Callable:
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels = shared["labels"][split["index"]]

        def loss(params: Any, keys: Key) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, _, stats = model.apply(variables, images, True, keys, axis)
            return smoothed(logits, labels, shared["hyper"]["smoothing"]), stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"], split["dropout"])
        value, gradient = parallel.average((value, gradient), axis)
        again = jax.vmap(lambda key: jax.random.fold_in(key, 1))(
            split["dropout"]
        )  # other dropout masks in the second pass

        def second(params: Any, _: int) -> Any:
            return jax.grad(loss, has_aux=True)(params, again)[0]

        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats of Python with arrays
            update, opt = _sam(shared["hyper"], adaptive, axis).update(
                gradient, state["opt"], state["params"], grad_fn=second
            )
        params = jax.tree.map(lambda p, u: p - whole["rate"] * u, state["params"], update)
        return {"params": params, "batch_stats": stats, "opt": opt}, {"loss": value}

    return step
