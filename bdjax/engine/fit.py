"""Supervised training: the whole set on the device, shuffled, gathered, augmented and stepped inside jit.

Randomness is one key a run: `fold_in` the epoch, then the image's place in the epoch. A resumed run, a
scan and a loop, one device and many therefore draw the same numbers. Hyper-parameter *values* are
arguments of the compiled program: other values compile nothing new.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine import parallel
from bdjax.engine.epoch import Mode, check_finite, run_epoch
from bdjax.engine.optimizer import Name, direction, learning_rates
from bdjax.engine.step import draw, training_step
from bdjax.errors import InputError
from bdjax.types import Control, Key, Model, Variables, Watch


@dataclass(frozen=True)
class FitConfig:
    """The recipe by which a model is trained."""

    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 128
    """Images a step, over all devices together; a last, smaller batch is dropped."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (default betas) or SGD with `momentum`."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """L2 term added to the gradient before momentum, as PyTorch does; biases and BN are decayed too."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Cosine to zero, or times 0.1 at 50 % and 75 % of the epochs."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "none"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; parameters and the loss stay float32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"fit.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"fit.learning_rate must be positive and finite, got {self.learning_rate}.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"fit.momentum must be in [0, 1), got {self.momentum}.")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"fit.weight_decay must be zero or more and finite, got {self.weight_decay}.")

    @property
    def dtype(self) -> Any:
        """The dtype to create the model with."""
        return jnp.dtype(self.precision)


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
    watch: Watch | None = None,
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
    return fit_controlled(
        model, images, labels, config, key, None, None,
        start=start, watch=watch, saver=saver, mode=mode, stage=stage, part=part,
    )[0]  # fmt: skip


def fit_controlled(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    config: FitConfig,
    key: Key,
    control: Control | None,
    attacker: Any,
    *,
    start: Variables | None = None,
    watch: Watch | None = None,
    saver: Saver | None = None,
    mode: Mode = "auto",
    stage: str = "training",
    part: str = "fit",
) -> tuple[Variables, Any]:
    """As :func:`fit`, with an attacker inside the step; returns also what became of `attacker`.

    Args:
      control: what is done to each batch; attacker: the arrays that it needs (see :class:`bdjax.types.Control`).
    """
    watch = watch or Watch()
    if config.batch_size > len(images):
        raise InputError(
            f"fit.batch_size={config.batch_size} is larger than the {len(images)} training images. "
            "Choose a smaller one."
        )
    parallel.check_batch(config.batch_size)
    steps = len(images) // config.batch_size
    init_key, data_key = jax.random.split(key)
    inside = replace(control, refresh=None) if control else None  # what the compiled step is made of
    step = training_step(model, config.optimizer, config.augment, inside)
    state = _init(model, config.optimizer, init_key, start)
    if control:
        state["attacker"] = jax.tree.map(jnp.array, dict(attacker or {}))  # a copy, for the step's state is donated
        if control.optimizer:
            state["attacker"]["opt"] = control.optimizer(control.config).init(state["attacker"]["params"])
    begun, curve = 0, np.zeros((config.epochs, 2), np.float32)  # loss and accuracy by epoch
    if saver and (found := saver.restore({**state, "curve": curve})):
        begun, state = found[0], dict(found[1])
        curve = np.array(state.pop("curve"))
        for epoch in range(begun):
            watch.recall(epoch + 1, train_loss=curve[epoch, 0], train_accuracy=curve[epoch, 1])
    rates = learning_rates(config.schedule, config.learning_rate, config.epochs * steps)
    shared = {
        "images": jnp.asarray(images),
        "labels": jnp.asarray(labels),
        "momentum": jnp.float32(config.momentum),
        "weight_decay": jnp.float32(config.weight_decay),
    }
    for epoch in range(begun, config.epochs):
        epoch_key = jax.random.fold_in(data_key, epoch)
        if control and control.refresh:
            again = {name: value for name, value in state["attacker"].items() if name != "opt"}
            refresh_key = jax.random.fold_in(epoch_key, 3)
            state["attacker"] |= control.refresh(control.config, again, _variables(state), epoch, refresh_key)
        split = draw(epoch_key, len(images), steps, config.batch_size, control.shares if control else None)
        whole = {"rate": jnp.asarray(rates[epoch * steps : (epoch + 1) * steps])}
        tick = _counted(watch, stage, epoch * steps, config.epochs * steps)
        state, metrics = run_epoch(step, state, split, whole, shared, mode=mode, tick=tick)
        check_finite(metrics["loss"], whole["rate"], epoch * steps, f"{stage} loss", f"{part}.learning_rate")
        curve[epoch] = metrics["loss"].mean(), metrics["accuracy"].mean()
        if saver:
            saver.save(epoch + 1, {**state, "curve": curve})
        watch.observe(epoch + 1, _variables(state), train_loss=curve[epoch, 0], train_accuracy=curve[epoch, 1])
    left = {name: value for name, value in state.get("attacker", {}).items() if name != "opt"}
    return _variables(state), left


def _variables(state: Any) -> Variables:
    return {"params": state["params"], "batch_stats": state["batch_stats"]}


def _counted(watch: Watch, stage: str, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: watch.tick(stage, before + done, total)


def _init(model: Model, optimizer: Name, key: Key, start: Variables | None) -> dict[str, Any]:
    given = jax.tree.map(jnp.array, {**start}) if start else jax.jit(model.init)(key)
    return {**given, "opt_state": direction(optimizer, jnp.float32(0)).init(given["params"])}
