"""Supervised training: the whole set on the device, shuffled, gathered, augmented and stepped inside jit.

Randomness is one key a run: `fold_in` the epoch, then the image's place in the epoch. A resumed run, a
scan and a loop, one device and many therefore draw the same numbers. Hyper-parameter *values* are
arguments of the compiled program: other values compile nothing new.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.config import FitConfig
from bdjax.engine import parallel
from bdjax.engine.epoch import Mode, check_finite, run_epoch
from bdjax.engine.optimizer import Name, direction, learning_rates
from bdjax.engine.step import draw, training_step
from bdjax.errors import InputError
from bdjax.types import Callback, Key, Model, TrainingHook, Variables


class Saver(Protocol):
    """Where `fit` leaves its state after every epoch, and finds it again."""

    def save(self, epoch: int, state: Any) -> None:
        """Keep `state` as it is after `epoch` epochs."""

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(epochs done, state) with the structure of `like`, or None."""


def fit(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    config: FitConfig,
    key: Key,
    *,
    start: Variables | None = None,
    callback: Callback | None = None,
    saver: Saver | None = None,
    mode: Mode = "auto",
    stage: str = "training",
    part: str = "fit",
) -> Variables:
    """Train `model`, from scratch or from `start`, and return its variables.

    Args:
      images: stored [N, H, W, C] (uint8, or float32 in [0, 1]); labels: int32 [N].
      watch: is told of every step, as of `stage`, and shown the variables after every epoch.
      saver: when it holds a state, training goes on from there, with bit-identical results and the whole curve.
      part: how the flags of the recipe begin, for the message about a loss that is not finite.

    Raises:
      InputError: a batch larger than the set or not divisible by the devices; a loss that is not finite.
    """
    return fit_with_hook(
        model, images, labels, config, key, None, None,
        start=start, callback=callback, saver=saver, mode=mode, stage=stage, part=part,
    )[0]  # fmt: skip


def fit_with_hook(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    config: FitConfig,
    key: Key,
    hook: TrainingHook | None,
    attacker: Any,
    *,
    start: Variables | None = None,
    callback: Callback | None = None,
    saver: Saver | None = None,
    mode: Mode = "auto",
    stage: str = "training",
    part: str = "fit",
) -> tuple[Variables, Any]:
    """As :func:`fit`, with an attacker inside the step; returns also what became of `attacker`.

    Args:
      control: what is done to each batch; attacker: the arrays that it needs (see :class:`bdjax.types.TrainingHook`).
    """
    callback = callback or Callback()
    if config.batch_size > len(images):
        raise InputError(
            f"fit.batch_size={config.batch_size} is larger than the {len(images)} training images. "
            "Choose a smaller one."
        )
    parallel.check_batch(config.batch_size)
    steps = len(images) // config.batch_size
    init_key, data_key = jax.random.split(key)
    inside = replace(hook, refresh=None) if hook else None  # what the compiled step is made of
    step = training_step(model, config.optimizer, config.augment, inside)
    state = _init(model, config.optimizer, init_key, start)
    if hook:
        state["attacker"] = jax.tree.map(jnp.array, dict(attacker or {}))  # a copy, for the step's state is donated
        if hook.optimizer:
            state["attacker"]["opt"] = hook.optimizer(hook.config).init(state["attacker"]["params"])
    begun, curve = 0, np.zeros((config.epochs, 2), np.float32)  # loss and accuracy by epoch
    if saver and (found := saver.restore({**state, "curve": curve})):
        begun, state = found[0], dict(found[1])
        curve = np.array(state.pop("curve"))
        for epoch in range(begun):
            callback.on_round_restored(epoch + 1, train_loss=curve[epoch, 0], train_accuracy=curve[epoch, 1])
    rates = learning_rates(config.schedule, config.learning_rate, config.epochs * steps)
    shared = {
        "images": jnp.asarray(images),
        "labels": jnp.asarray(labels),
        "momentum": jnp.float32(config.momentum),
        "weight_decay": jnp.float32(config.weight_decay),
    }
    for epoch in range(begun, config.epochs):
        epoch_key = jax.random.fold_in(data_key, epoch)
        if hook and hook.refresh:
            again = {name: value for name, value in state["attacker"].items() if name != "opt"}
            refresh_key = jax.random.fold_in(epoch_key, 3)
            state["attacker"] |= hook.refresh(hook.config, again, _variables(state), epoch, refresh_key)
        split = draw(epoch_key, len(images), steps, config.batch_size, hook.shares if hook else None)
        whole = {"rate": jnp.asarray(rates[epoch * steps : (epoch + 1) * steps])}
        tick = _counted(callback, stage, epoch * steps, config.epochs * steps)
        state, metrics = run_epoch(step, state, split, whole, shared, mode=mode, tick=tick)
        check_finite(metrics["loss"], whole["rate"], epoch * steps, f"{stage} loss", f"{part}.learning_rate")
        curve[epoch] = metrics["loss"].mean(), metrics["accuracy"].mean()
        if saver:
            saver.save(epoch + 1, {**state, "curve": curve})
        callback.on_round_end(epoch + 1, _variables(state), train_loss=curve[epoch, 0], train_accuracy=curve[epoch, 1])
    left = {name: value for name, value in state.get("attacker", {}).items() if name != "opt"}
    return _variables(state), left


def _variables(state: Any) -> Variables:
    return {"params": state["params"], "batch_stats": state["batch_stats"]}


def _counted(callback: Callback, stage: str, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: callback.on_progress(stage, before + done, total)


def _init(model: Model, optimizer: Name, key: Key, start: Variables | None) -> dict[str, Any]:
    given = jax.tree.map(jnp.array, {**start}) if start else jax.jit(model.init)(key)
    return {**given, "opt_state": direction(optimizer, jnp.float32(0)).init(given["params"])}
