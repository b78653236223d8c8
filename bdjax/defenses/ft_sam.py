"""FT-SAM: fine-tuning that looks for flat minima, by sharpness-aware steps (Zhu et al., ICCV 2023).

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

In every step the loss is ascended first, in proportion to the size of each weight, which shrinks the large weights of
neurons that a backdoor uses:

    g = ∂/∂θ mean CE(f_θ(x), y),     e = ρ θ² ⊙ g / (‖ |θ| ⊙ g ‖_2 + 1e-12)
    θ <- θ - η ∂/∂θ mean CE(f_{θ+e}(x), y)

The norm is over all parameters together; `adaptive=False` is plain SAM, e = ρ g / (‖g‖_2 + 1e-12). BatchNorm statistics
follow the first pass alone. The steps are those of `optax.contrib.sam`. The defaults are BackdoorBench's, by the same
group, for CIFAR-10: ρ 2, labels smoothed by 0.1 (spread over the other classes), SGD 0.01 with momentum 0.9 and weight
decay 5e-4, batches of 256, 100 epochs; for GTSRB and Tiny ImageNet ρ 8, no smoothing, GTSRB 50 epochs.

`cosine` has both readings of its schedule. The release steps a cosine of T_max = 100 once a *batch*: the rate falls to
zero in 100 steps, rises again in 100, and so on, whatever the number of epochs ("batches"). Meant was, and elsewhere
reimplemented is, one cosine over all epochs ("epochs"). They are different methods.

**Deviations** from the release: its test of every epoch on triggered images decides nothing and is left out; its
gradient decomposition (α = 0 there) and its schedule of ρ (constant there) as well; CIFAR-10's flips are `augment`'s
crop_flip. An epoch is cut into equal batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import augment
from bdjax.defenses._tuning import begin, equal_batches, model_of, passes
from bdjax.engine import parallel
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The recipe."""

    epochs: int = 100
    """Passes over the clean images."""
    batch_size: int = 256
    """Images a step, at most."""
    rho: float = 2.0
    """ρ, how far the loss is ascended."""
    adaptive: bool = True
    """Ascend in proportion to the size of each weight."""
    smoothing: float = 0.1
    """Probability that the other classes share, in [0, 1)."""
    learning_rate: float = 0.01
    """Of SGD, at the first step."""
    cosine: Literal["batches", "epochs", "off"] = "batches"
    """What the cosine of the rate counts: batches, falling and rising by turns (the release); epochs, falling to zero
    at the end; nothing."""
    half_period: int = 100
    """Batches in which the cosine of "batches" falls to zero."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """L2 term added to the gradient of the second pass."""
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
    """Train the victim on with clean images, by sharpness-aware steps.

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

    def after(epoch: int, state: Any, metrics: dict[str, Any]) -> None:
        view.watch.observe(epoch, model_of(state), **metrics)

    state = passes(
        _step(victim.model, config.augment, config.adaptive), state, shared, rates(config, number), size, key,
        partial(view.watch.tick, "FT-SAM"), after,
    )  # fmt: skip
    return model_of(state)


def rates(config: Config, number: int) -> np.ndarray:
    """Learning rates of all steps, float32 [epochs, number], `number` being the batches of an epoch."""
    step = np.arange(config.epochs * number).reshape(config.epochs, number)
    if config.cosine == "batches":
        phase = step / config.half_period
    elif config.cosine == "epochs":
        phase = step // number / config.epochs
    else:
        phase = np.zeros(step.shape)
    return np.asarray(config.learning_rate * (1 + np.cos(np.pi * phase)) / 2, np.float32)


def ascent(params: Any, gradient: Any, rho: Any, adaptive: bool) -> Any:
    """e, a pytree like the parameters."""
    size = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, params)
    scaled = jax.tree.map(jnp.multiply, size, gradient)
    length = jnp.sqrt(jax.tree.reduce(jnp.add, jax.tree.map(lambda s: (s**2).sum(), scaled)))
    return jax.tree.map(lambda a, s: rho * a * s / (length + 1e-12), size, scaled)


def smoothed(logits: jax.Array, labels: jax.Array, smoothing: Any) -> jax.Array:
    """Mean cross-entropy where the label has 1 - smoothing and every other class an equal part of the rest."""
    classes = logits.shape[-1]
    hot = jax.nn.one_hot(labels, classes)
    wanted = hot * (1 - smoothing) + (1 - hot) * smoothing / (classes - 1)
    return -(wanted * jax.nn.log_softmax(logits)).sum(-1).mean()


_DYNAMIC = ("rho", "smoothing", "momentum", "weight_decay")


def _sam(hyper: Any, adaptive: bool, axis: str | None) -> optax.GradientTransformationExtraArgs:
    """Optax's SAM, both passes in one update; what it returns is a direction, to be multiplied by the rate."""

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
        again = jax.vmap(lambda key: jax.random.fold_in(key, 1))(split["dropout"])  # the second pass drops others

        def second(params: Any, _: int) -> Any:
            return jax.grad(loss, has_aux=True)(params, again)[0]

        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats of Python with arrays
            update, opt = _sam(shared["hyper"], adaptive, axis).update(
                gradient, state["opt"], state["params"], grad_fn=second
            )
        params = jax.tree.map(lambda p, u: p - whole["rate"] * u, state["params"], update)
        return {"params": params, "batch_stats": stats, "opt": opt}, {"loss": value}

    return step
