"""BAERASER: recover the distribution of triggers of every label, then unlearn it by gradient ascent (Liu et al.,
INFOCOM 2022).

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Stage 1 is a max-entropy staircase (:mod:`bdjax.defenses._staircase`): triggers for every label, of which those are kept
that turn at least a share τ of the images. Their labels are the suspected targets; without any, the model is given back
as it is. Stage 2, with θ_0 the given weights, x_b a clean image x_c with a kept trigger and y_b the trigger's label:

    ω_k = |∂ mean CE(f_θ(x_c), y_c) / ∂θ_k|      over all clean images, at the θ of now, a constant to what follows
    L_U = α [CE(f_θ(x_c), y_c) − CE(f_θ(x_b), y_b)] + β Σ_k ω_k |θ_k − θ_0,k|                           (Eq. 4-5)

ω is computed before each of I iterations, and each is one pass of SGD over the clean images in batches, ten steps at
least (ours; `steps=1`: one step of it): the paper says "about 8 iterations" and does not say of what. The derivative of
|·| at 0 is 0; elsewhere it does not fall towards θ_0, around which SGD lets a weight tremble by about rate · β ω.

−CE has no floor. Ours, against divergence: CE(f(x_b), y_b) of an image counts up to log C + `ascent_margin`, where its
gradient ends; a share of the clean images is held out, and an iteration after which accuracy on it is more than
`largest_drop` below the given model's, or a loss not finite, is undone, not counted (3 I are tried at most), and the
rate halved; 10 points, for the paper gives up 9 on CIFAR-10, and the first iterations cost most. When the recovered
triggers are forgotten, the ascent is silent and the rest of the iterations gives accuracy back: all I are taken.

Ours, too: α = β = 1 (what its trade-off table has in common with its main ones); images that are of class y_b already
are not ascended on; BatchNorm statistics are the stored ones. The paper's share of clean images ("5 %") is of the
training set's size, though they come from the test set: --split.size. n, η, τ, I and the networks are not in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import Pool, Showing, batches, draw, stamp, stamper
from bdjax.defenses._staircase import RecoveryConfig, recover
from bdjax.engine import parallel, predict, run_epoch
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float


@dataclass(frozen=True)
class Config(RecoveryConfig):
    """Recovery (the fields of RecoveryConfig) and unlearning."""

    epochs: int = 8
    """I, iterations of unlearning, before each of which ω is computed."""
    steps: int = 0
    """Steps of SGD in an iteration; 0: a pass over the clean images, again if that is fewer than ten steps, and 1 / α
    times as many where α < 1 makes each of them shorter (ours)."""
    learning_rate: float = 0.01
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    alpha: float = 1.0
    """α, weight of descent on clean and ascent on triggered images."""
    beta: float = 1.0
    """β, weight of the distance to the given model."""
    ascent_margin: float = 2.0
    """What the loss of a triggered image may exceed log C by before it is no more ascended, in nats."""
    holdout: float = 0.1
    """Share of the clean images that nothing is learnt from, for the guard; in [0, 1). 0: it sees all of them. Where
    the view has validation images, they are taken in place of a share."""
    largest_drop: float = 0.1
    """What an iteration may leave of accuracy on them below the given model's, a fraction; 1 switches the guard off."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """Statistics: the stored ones (scale and shift are trained), or the batch's, clean and triggered together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("epochs",), "at least 1", lambda v: v >= 1),
            (("learning_rate", "alpha"), "positive", lambda v: v > 0),
            (("steps", "beta", "ascent_margin"), "zero or more", lambda v: v >= 0),
            (("momentum", "holdout"), "in [0, 1)", lambda v: 0 <= v < 1),
            (("largest_drop",), "in [0, 1]", lambda v: 0 <= v <= 1),
        )


ON_REQUEST = True
"""An audit runs it only when it is named: three generators for each class take minutes on a CPU."""


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Recover triggers of every label, and unlearn those that work.

    Args:
      config: the procedure; victim: the model; view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws which images are held out, batches, noise, and which trigger an image gets.

    Returns: the cleaned variables; the watch is shown them, the suspected labels and the recovered triggers after each
      iteration that stands, or once if no label is suspected.
    Raises InputError when the guard lets no iteration stand, or nothing can be recovered (see `recover`).
    """
    model, given = victim.model, {**victim.variables}
    learn, held = _parted(config, view, jax.random.fold_in(key, 0))
    pool = recover(config, victim, learn, jax.random.fold_in(key, 1))
    view.callback.on_detection(_scores(pool, model.classes))
    callback = Showing(view.callback, pool)
    if not len(pool.suspected()):
        callback.on_round_end(1, given)
        return given
    size = batch_of(config.batch_size, len(learn.labels), "clean images a step")
    number = config.steps or math.ceil(max(len(learn.labels) // size, 10) / min(1.0, config.alpha))
    shared: dict[str, Any] = {
        "images": jnp.asarray(learn.images),
        "labels": jnp.asarray(learn.labels),
        "pool": pool,
        "original": jax.tree.map(jnp.copy, given["params"]),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC}
        | {"cap": jnp.float32(np.log(model.classes) + config.ascent_margin)},
    }
    state = {"params": given["params"], "stats": given["batch_stats"]}
    state["opt"] = direction("sgd", config.momentum).init(state["params"])
    guard = _guard(config, model, held, pool, jax.random.fold_in(key, 2))
    floor, rate, stands, steps = guard(given)["guard_accuracy"] - config.largest_drop, config.learning_rate, 0, 0
    for attempt in range(_ATTEMPTS * config.epochs):
        own = jax.random.fold_in(jax.random.fold_in(key, 3), attempt)
        split = {
            "index": batches(jax.random.fold_in(own, 0), len(learn.labels), size, number),
            "key": jax.random.split(jax.random.fold_in(own, 1), (number, size)),
        }
        shared["omega"] = importance(model, {"params": state["params"], "batch_stats": state["stats"]}, learn, size)
        shared["hyper"]["rate"] = jnp.float32(rate)
        tick = partial(view.callback.on_progress, f"unlearning, iteration {stands + 1} of {config.epochs}")
        after, metrics = run_epoch(
            _step(model, config.form, config.batch_norm), jax.tree.map(jnp.copy, state), split, {}, shared, tick=tick
        )
        variables = {"params": after["params"], "batch_stats": after["stats"]}
        finite = all(bool(np.isfinite(values).all()) for values in metrics.values())
        rates = guard(variables) if finite else {}
        if not finite or rates["guard_accuracy"] < floor:
            rate /= 2
            continue
        state, stands, steps = after, stands + 1, steps + number
        means = {name: values.mean() for name, values in metrics.items()}
        callback.on_round_end(stands, variables, **means, **rates, rate=rate, theta_steps=steps)
        if stands == config.epochs:
            break
    if not stands:
        raise InputError(
            f"none of {_ATTEMPTS * config.epochs} iterations of unlearning kept the loss finite and held-out accuracy "
            f"within defense.largest_drop={config.largest_drop} of the given model's. "
            "Use a smaller --defense.learning-rate."
        )
    return {"params": state["params"], "batch_stats": state["stats"]}


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Whether a trigger of any label works, and which label's work best: those that survive τ are the suspects.

    Args: as of :func:`purify`.
    Returns: per label the largest ASR of a trigger that was made for it; the watch is shown those that are kept.
    Raises InputError as `recover` does.
    """
    pool = recover(config, victim, view, key)
    Showing(view.callback, pool).on_round_end(0, victim.variables)
    return _scores(pool, victim.model.classes)


def _scores(pool: Pool, classes: int) -> Scores:
    labels, asr = np.asarray(pool.labels), np.asarray(pool.asr)
    best = np.array([asr[labels == label].max(initial=0) for label in range(classes)], np.float32)
    target = int(np.argmax(best))
    return Scores(best, target, float(best[target]), bool(len(pool.suspected())))


def importance(model: Model, variables: Variables, view: DefenderView, size: int) -> Any:
    """ω: absolute values of the gradient of the mean cross-entropy of all clean images, a pytree like the parameters.

    Args: size: images whose gradient is computed at once; in evaluation mode.
    """
    total = len(view.labels)
    at = np.arange(-(-total // size) * size).reshape(-1, size)  # a last, smaller batch is filled up with weight zero
    split = {"index": jnp.asarray(np.minimum(at, total - 1)), "weight": jnp.asarray((at < total) / total, jnp.float32)}
    shared = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "variables": jax.tree.map(jnp.asarray, dict(variables)),
    }
    start = {"gradient": jax.tree.map(jnp.zeros_like, variables["params"])}
    state, _ = run_epoch(_gatherer(model), start, split, {}, shared)
    return jax.tree.map(jnp.abs, state["gradient"])


def deviation(params: Any, original: Any, omega: Any) -> jax.Array:
    """Σ ω |θ − θ_0| over a pytree (Eq. 4); ω is a constant to derivatives, and that of |·| at 0 is 0 (jnp.abs: 1)."""

    def term(p: jax.Array, o: jax.Array, w: jax.Array) -> jax.Array:
        return (jax.lax.stop_gradient(w * jnp.sign(p - o)) * (p - o)).sum()

    return jax.tree.reduce(jnp.add, jax.tree.map(term, params, original, omega))


_ATTEMPTS = 3  # at an iteration, on average
_DYNAMIC = ("alpha", "beta", "momentum")


def _parted(config: Config, view: DefenderView, key: Key) -> tuple[DefenderView, DefenderView]:
    """The view to learn from, and the one that the guard is asked on."""
    if view.validation is not None:
        return view, view.validation
    total = len(view.labels)
    held = min(max(1, int(config.holdout * total)), total - 1) if config.holdout else 0
    if not held:
        return view, view
    order = np.asarray(jax.random.permutation(key, total))
    parts = (np.sort(order[held:]), np.sort(order[:held]))
    learn, kept = (replace(view, images=view.images[at], labels=view.labels[at]) for at in parts)
    return learn, kept


def _guard(config: Config, model: Model, held: DefenderView, pool: Pool, key: Key) -> Callable:
    """variables -> {"guard_accuracy", "guard_asr"} on held-out images; each has one trigger, the same every time."""
    keys = jax.random.split(key, len(held.labels))
    stamped, wanted = (np.asarray(a) for a in stamper(config.form)(pool, to_float(held.images), keys))
    counted = wanted != held.labels

    def measure(variables: Variables) -> dict[str, float]:
        right = predict(model, variables, held.images) == held.labels
        obeyed = (predict(model, variables, stamped) == wanted) & counted
        return {"guard_accuracy": float(right.mean()), "guard_asr": float(obeyed.sum() / max(1, counted.sum()))}

    return measure


@lru_cache(maxsize=16)
def _gatherer(model: Model) -> Callable:
    """One batch's share of the gradient of the mean cross-entropy, in the engine's form."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]

        def loss(params: Any) -> jax.Array:
            logits = model.logits({**shared["variables"], "params": params}, images)
            return (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * split["weight"]).sum()

        value, gradient = parallel.total(jax.value_and_grad(loss)(shared["variables"]["params"]), axis)
        return {"gradient": jax.tree.map(jnp.add, state["gradient"], gradient)}, {"loss": value}

    return step


@lru_cache(maxsize=16)
def _step(model: Model, form: str, batch_norm: str) -> Callable:
    """One step of θ on L_U, in the engine's form."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, clean = shared["hyper"], to_float(shared["images"][split["index"]])
        labels = shared["labels"][split["index"]]
        triggers, wanted, places = draw(shared["pool"], split["key"])
        both = jnp.concatenate([clean, stamp(form, clean, triggers, split["key"], places)])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["stats"]}
            logits, _, stats = model.apply(variables, both, batch_norm == "batch", None, axis)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate([labels, wanted]))
            each = {
                "clean": each[: len(labels)],
                "triggered": each[len(labels) :],
                "counted": (labels != wanted).astype(jnp.float32),
            }
            each = parallel.all_gather(each, axis)  # of all devices, so that the means are those of the whole batch
            weight = each["counted"] / jnp.maximum(each["counted"].sum(), 1)
            descent = each["clean"].mean()
            ascent = (jnp.minimum(each["triggered"], hyper["cap"]) * weight).sum()
            far = deviation(params, shared["original"], shared["omega"])
            value = hyper["alpha"] * (descent - ascent) + hyper["beta"] * far
            return value, (stats, {"loss": value, "clean_loss": descent, "triggered_loss": ascent, "deviation": far})

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient = parallel.average(gradient, axis)
        update, opt = direction("sgd", hyper["momentum"]).update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - hyper["rate"] * u, state["params"], update)
        return {"params": params, "stats": stats, "opt": opt}, metrics

    return step
