"""Supervised training with the whole training set on the device.

Shuffling, gathering, augmentation and the update run inside jit. A run has one random key, into which the epoch and the
image's position in the epoch are folded; the random numbers are therefore the same in a resumed run, in a scan and a
loop, and on one device and several. Hyper-parameter *values* are arguments of the compiled program, so changing them
does not recompile it.
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
    """Storage for the state of `fit` after every epoch."""

    def save(self, epoch: int, state: Any) -> None:
        """Save the state after `epoch` epochs."""

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Return (finished epochs, state with the structure of `like`), or None when nothing is saved."""


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
    """Train a model from scratch or from given variables.

    Args:
      model: the classifier.
      images: stored [N, H, W, C] (uint8, or float32 in [0, 1]).
      labels: int32 [N].
      config: the training recipe.
      key: random key of the run.
      start: initial variables; None: initialise from `key`.
      callback: receives the progress of every step and the variables after every epoch.
      saver: saves the state after every epoch. When it holds a state, training resumes from it with bit-identical
        results, and the callback receives the whole curve.
      mode: see :func:`bdjax.engine.run_epoch`.
      stage: name of the training stage, for progress and messages.
      part: prefix of the recipe's command-line flags, for the message about a non-finite loss.

    Returns:
      The trained variables.

    Raises:
      InputError: when the batch size exceeds the number of images or is not divisible by the number of devices, or
        when the loss becomes NaN or infinite.
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
    """Train like :func:`fit`, with an attacker's hook inside the training step.

    Args:
      model: the classifier.
      images: stored [N, H, W, C] (uint8, or float32 in [0, 1]).
      labels: int32 [N].
      config: the training recipe.
      key: random key of the run.
      hook: transformations of each batch and of the loss (see :class:`bdjax.types.TrainingHook`); None: none.
      attacker: the hook's arrays, {"fixed", "params", "state"}.
      start: initial variables; None: initialise from `key`.
      callback: receives the progress of every step and the variables after every epoch.
      saver: saves the state after every epoch. When it holds a state, training resumes from it with bit-identical
        results, and the callback receives the whole curve.
      mode: see :func:`bdjax.engine.run_epoch`.
      stage: name of the training stage, for progress and messages.
      part: prefix of the recipe's command-line flags, for the message about a non-finite loss.

    Returns:
      (trained variables, the hook's arrays after training).

    Raises:
      InputError: as :func:`fit`.
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
    compiled_hook = replace(hook, refresh=None) if hook else None  # `refresh` is not part of the compiled step
    step = training_step(model, config.optimizer, config.augment, compiled_hook)
    state = _init(model, config.optimizer, init_key, start)
    if hook:
        state["attacker"] = jax.tree.map(jnp.array, dict(attacker or {}))  # a copy, because the state is donated
        if hook.optimizer:
            state["attacker"]["opt"] = hook.optimizer(hook.config).init(state["attacker"]["params"])
    first_epoch, curve = 0, np.zeros((config.epochs, 2), np.float32)  # loss and accuracy by epoch
    if saver and (saved := saver.restore({**state, "curve": curve})):
        first_epoch, state = saved[0], dict(saved[1])
        curve = np.array(state.pop("curve"))
        for epoch in range(first_epoch):
            callback.on_round_restored(epoch + 1, train_loss=curve[epoch, 0], train_accuracy=curve[epoch, 1])
    rates = learning_rates(config.schedule, config.learning_rate, config.epochs * steps)
    constants = {
        "images": jnp.asarray(images),
        "labels": jnp.asarray(labels),
        "momentum": jnp.float32(config.momentum),
        "weight_decay": jnp.float32(config.weight_decay),
    }
    for epoch in range(first_epoch, config.epochs):
        epoch_key = jax.random.fold_in(data_key, epoch)
        if hook and hook.refresh:
            arrays = {name: value for name, value in state["attacker"].items() if name != "opt"}
            refresh_key = jax.random.fold_in(epoch_key, 3)
            state["attacker"] |= hook.refresh(hook.config, arrays, _variables(state), epoch, refresh_key)
        batch = draw(epoch_key, len(images), steps, config.batch_size, hook.shares if hook else None)
        per_step = {"rate": jnp.asarray(rates[epoch * steps : (epoch + 1) * steps])}
        tick = _progress(callback, stage, epoch * steps, config.epochs * steps)
        state, metrics = run_epoch(step, state, batch, per_step, constants, mode=mode, tick=tick)
        check_finite(metrics["loss"], per_step["rate"], epoch * steps, f"{stage} loss", f"{part}.learning_rate")
        curve[epoch] = metrics["loss"].mean(), metrics["accuracy"].mean()
        if saver:
            saver.save(epoch + 1, {**state, "curve": curve})
        callback.on_round_end(epoch + 1, _variables(state), train_loss=curve[epoch, 0], train_accuracy=curve[epoch, 1])
    trained = {name: value for name, value in state.get("attacker", {}).items() if name != "opt"}
    return _variables(state), trained


def _variables(state: Any) -> Variables:
    return {"params": state["params"], "batch_stats": state["batch_stats"]}


def _progress(callback: Callback, stage: str, before: int, total: int) -> Callable[[int, int], None]:
    """Return a `tick(done, _)` that reports `before + done` of `total` steps."""
    return lambda done, _: callback.on_progress(stage, before + done, total)


def _init(model: Model, optimizer: Name, key: Key, start: Variables | None) -> dict[str, Any]:
    """Return the initial training state; `start` is copied because the state is donated."""
    variables = jax.tree.map(jnp.array, {**start}) if start else jax.jit(model.init)(key)
    return {**variables, "opt_state": direction(optimizer, jnp.float32(0)).init(variables["params"])}
