"""BAERASER: recover the distribution of triggers of every label, then unlearn it by gradient ascent.

Y. Liu, M. Fan, C. Chen, X. Liu, Z. Ma, L. Wang and J. Ma, "Backdoor Defense with Machine Unlearning", INFOCOM 2022,
arXiv:2201.09538.

Threat model: the defender has the model and clean labelled images, but no trigger and no target label.

Stage 1 is a max-entropy staircase (:mod:`bdjax.defenses._staircase`): triggers for every label, of which those are
accepted that change the prediction of at least a fraction τ of the images. Their labels are the suspected targets.
Without any, the model is returned unchanged. Stage 2, with θ_0 the given weights, x_b a clean image x_c with an
accepted trigger and y_b the trigger's label:

    ω_k = |∂ mean CE(f_θ(x_c), y_c) / ∂θ_k|      over all clean images, at the current θ, constant in what follows
    L_U = α [CE(f_θ(x_c), y_c) − CE(f_θ(x_b), y_b)] + β Σ_k ω_k |θ_k − θ_0,k|                           (Eq. 4-5)

ω is computed before each of I iterations. The derivative of |·| at 0 is 0; elsewhere it does not decrease towards θ_0,
around which SGD lets a weight oscillate by about rate · β ω.

Deviations:

- An iteration is one pass of SGD over the clean images in batches, at least ten steps (ours; `steps=1`: one step). The
  paper says "about 8 iterations" without a definition.
- Against divergence (ours), because −CE is unbounded: CE(f(x_b), y_b) of an image counts up to log C + `ascent_margin`,
  beyond which its gradient is zero.
- A share of the clean images is held out (ours). An iteration is undone and not counted, and the learning rate halved,
  when accuracy on them falls by more than `largest_drop` from the given model's or a loss is not finite; at most 3 I
  iterations are tried. The default is 10 points, because the paper loses 9 on CIFAR-10 and the first iterations cost
  most. Once the recovered triggers are forgotten, the ascent has no gradient and the remaining iterations restore
  accuracy, so all I are run.
- α = β = 1 (ours; the setting that the paper's trade-off table shares with its main tables). Images that are of class
  y_b are excluded from the ascent. BatchNorm statistics are the stored ones.
- The paper's share of clean images ("5 %") refers to the size of the training set, though they come from the test set:
  --split.size. n, η, τ, I and the networks are not stated.
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
from bdjax.defenses._importance import deviation, importance
from bdjax.defenses._pool import Pool, PoolCallback, draw_batches, draw_triggers, pool_scores, stamp, stamper
from bdjax.defenses._staircase import RecoveryConfig, recover
from bdjax.engine import parallel, predict, run_epoch
from bdjax.engine.optimizer import direction, take_step
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config(RecoveryConfig):
    """Hyper-parameters of the recovery (the fields of RecoveryConfig) and of the unlearning."""

    epochs: int = 8
    """I, iterations of unlearning; ω is computed before each."""
    steps: int = 0
    """Steps of SGD per iteration; 0: a pass over the clean images, repeated up to ten steps, and 1 / α times as many
    when α < 1 makes each step shorter (ours)."""
    learning_rate: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    alpha: float = 1.0
    """α, weight of the descent on clean and the ascent on triggered images."""
    beta: float = 1.0
    """β, weight of the distance to the given model."""
    ascent_margin: float = 2.0
    """The loss of a triggered image is ascended up to log C plus this margin, in nats."""
    holdout: float = 0.1
    """Fraction of the clean images that is held out to check the iterations; in [0, 1). 0: they are checked on all
    images. The validation images of the view, if any, are used instead."""
    largest_drop: float = 0.1
    """Largest drop of held-out accuracy from the given model's after an iteration, a fraction; 1 disables the check."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """BatchNorm statistics: the stored ones (scale and shift are trained), or those of the batch of clean and triggered
    images."""

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


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Recover triggers for every label, and unlearn those that are accepted.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the variables, the suspected labels
        and the recovered triggers after each accepted iteration, or once if no label is suspected.
      key: draws the held-out images, batches, noise, and the trigger of each image.

    Returns:
      The cleaned variables; those of the victim when no label is suspected.

    Raises:
      InputError: when no iteration passes the check, or nothing can be recovered (see `recover`).
    """
    model, original = victim.model, {**victim.variables}
    training, held_out = _hold_out(config, view, jax.random.fold_in(key, 0))
    pool = recover(config, victim, training, jax.random.fold_in(key, 1))
    view.callback.on_detection(pool_scores(pool, model.classes))
    callback = PoolCallback(view.callback, pool)
    if not len(pool.suspected_labels()):
        callback.on_round_end(1, original)
        return original
    total = len(training.labels)
    batch_size = batch_of(config.batch_size, total, "clean images a step")
    steps = config.steps or math.ceil(max(total // batch_size, 10) / min(1.0, config.alpha))
    constants: dict[str, Any] = {
        "images": jnp.asarray(training.images),
        "labels": jnp.asarray(training.labels),
        "pool": pool,
        "original": jax.tree.map(jnp.copy, original["params"]),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC}
        | {"cap": jnp.float32(np.log(model.classes) + config.ascent_margin)},
    }
    state = {"params": original["params"], "stats": original["batch_stats"]}
    state["opt"] = direction("sgd", config.momentum).init(state["params"])
    step = _step(model, config.form, config.batch_norm)
    measure = _held_out_rates(config, model, held_out, pool, jax.random.fold_in(key, 2))
    lowest_accuracy = measure(original)["guard_accuracy"] - config.largest_drop
    rate, accepted, total_steps = config.learning_rate, 0, 0
    for attempt in range(_ATTEMPTS * config.epochs):
        attempt_key = jax.random.fold_in(jax.random.fold_in(key, 3), attempt)
        batches = {
            "index": draw_batches(jax.random.fold_in(attempt_key, 0), total, batch_size, steps),
            "key": jax.random.split(jax.random.fold_in(attempt_key, 1), (steps, batch_size)),
        }
        current = {"params": state["params"], "batch_stats": state["stats"]}
        constants["omega"] = importance(model, current, training, batch_size)
        constants["hyper"]["rate"] = jnp.float32(rate)
        tick = partial(view.callback.on_progress, f"unlearning, iteration {accepted + 1} of {config.epochs}")
        candidate, metrics = run_epoch(step, jax.tree.map(jnp.copy, state), batches, {}, constants, tick=tick)
        variables = {"params": candidate["params"], "batch_stats": candidate["stats"]}
        is_finite = all(bool(np.isfinite(values).all()) for values in metrics.values())
        rates = measure(variables) if is_finite else {}
        if not is_finite or rates["guard_accuracy"] < lowest_accuracy:
            rate /= 2
            continue
        state, accepted, total_steps = candidate, accepted + 1, total_steps + steps
        means = {name: values.mean() for name, values in metrics.items()}
        callback.on_round_end(accepted, variables, **means, **rates, rate=rate, theta_steps=total_steps)
        if accepted == config.epochs:
            break
    if not accepted:
        raise InputError(
            f"none of {_ATTEMPTS * config.epochs} iterations of unlearning kept the loss finite and held-out accuracy "
            f"within defense.largest_drop={config.largest_drop} of the given model's. "
            "Use a smaller --defense.learning-rate."
        )
    return {"params": state["params"], "batch_stats": state["stats"]}


_ATTEMPTS = 3
"""Attempts per iteration, on average."""
_DYNAMIC = ("alpha", "beta", "momentum")


def _hold_out(config: Config, view: DefenderView, key: Key) -> tuple[DefenderView, DefenderView]:
    """Return the view to train on and the view to check iterations on."""
    if view.validation is not None:
        return view, view.validation
    total = len(view.labels)
    held_out_count = min(max(1, int(config.holdout * total)), total - 1) if config.holdout else 0
    if not held_out_count:
        return view, view
    order = np.asarray(jax.random.permutation(key, total))
    parts = (np.sort(order[held_out_count:]), np.sort(order[:held_out_count]))
    training, held_out = (replace(view, images=view.images[at], labels=view.labels[at]) for at in parts)
    return training, held_out


def _held_out_rates(config: Config, model: Model, held_out: DefenderView, pool: Pool, key: Key) -> Callable:
    """Return variables -> {"guard_accuracy", "guard_asr"} on held-out images, each with one fixed trigger."""
    keys = jax.random.split(key, len(held_out.labels))
    stamped, target_labels = (np.asarray(a) for a in stamper(config.form)(pool, to_float(held_out.images), keys))
    of_others = target_labels != held_out.labels

    def measure(variables: Variables) -> dict[str, float]:
        is_correct = predict(model, variables, held_out.images) == held_out.labels
        is_triggered = (predict(model, variables, stamped) == target_labels) & of_others
        return {
            "guard_accuracy": float(is_correct.mean()),
            "guard_asr": float(is_triggered.sum() / max(1, of_others.sum())),
        }

    return measure


@lru_cache(maxsize=16)
def _step(model: Model, form: str, batch_norm: str) -> Callable:
    """Return one step of θ on L_U, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, clean = constants["hyper"], to_float(constants["images"][batch["index"]])
        labels = constants["labels"][batch["index"]]
        triggers, target_labels, position_logits = draw_triggers(constants["pool"], batch["key"])
        images = jnp.concatenate([clean, stamp(form, clean, triggers, batch["key"], position_logits)])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["stats"]}
            logits, _, stats = model.apply(variables, images, batch_norm == "batch", None, axis)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate([labels, target_labels]))
            per_image = {
                "clean": losses[: len(labels)],
                "triggered": losses[len(labels) :],
                "counted": (labels != target_labels).astype(jnp.float32),
            }
            per_image = parallel.all_gather(per_image, axis)  # the means are those of the whole batch
            weight = per_image["counted"] / jnp.maximum(per_image["counted"].sum(), 1)
            descent = per_image["clean"].mean()
            ascent = (jnp.minimum(per_image["triggered"], hyper["cap"]) * weight).sum()
            distance = deviation(params, constants["original"], constants["omega"])
            value = hyper["alpha"] * (descent - ascent) + hyper["beta"] * distance
            metrics = {"loss": value, "clean_loss": descent, "triggered_loss": ascent, "deviation": distance}
            return value, (stats, metrics)

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient = parallel.average(gradient, axis)
        update, opt = direction("sgd", hyper["momentum"]).update(gradient, state["opt"])
        params = take_step(state["params"], update, hyper["rate"])
        return {"params": params, "stats": stats, "opt": opt}, metrics

    return step
