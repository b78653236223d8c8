"""Training of the victim on the defender's images, with the engine's step or with a step of the method's own."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._batch import batch_of
from bdjax.engine import FitConfig, fit, parallel, run_epoch
from bdjax.engine.callbacks import ForwardingCallback
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import Name, direction, take_step
from bdjax.engine.step import draw
from bdjax.types import Callback, Key, Variables, Victim


def tune(
    victim: Victim, images: Any, labels: np.ndarray, recipe: FitConfig, key: Key, callback: Callback, stage: str,
    before: int = 0,
) -> Variables:  # fmt: skip
    """Train the victim further in training mode by a recipe.

    Args:
      victim: the model to train.
      images: stored [n, H, W, C].
      labels: int32 [n].
      recipe: the training recipe. Its batch size is reduced to the number of images, and to a multiple of the number
        of devices.
      key: random key that shuffles and augments the images.
      callback: receives the variables after each epoch.
      stage: name of the training stage, for progress and messages.
      before: number of rounds that were reported to the callback before this training.

    Returns:
      The trained variables.

    Raises:
      InputError: when the batch size or the number of images is smaller than the number of devices, or when the loss
        becomes NaN or infinite.
    """
    size = batch_of(recipe.batch_size, len(labels))
    return fit(
        victim.model, images, labels, replace(recipe, batch_size=size), key, start=victim.variables,
        callback=_OffsetCallback(callback, before), stage=stage, part="defense",
    )  # fmt: skip


def equal_batches(batch_size: int, total: int) -> tuple[int, int]:
    """Divide an epoch into batches of equal size, so that it leaves out as few images as possible.

    Args:
      batch_size: largest number of images in a batch.
      total: number of images.

    Returns:
      (number of batches, images in each batch).

    Raises:
      InputError: when the batch size or the number of images is smaller than the number of devices.
    """
    devices = parallel.count()
    batch_of(batch_size, total)
    size = max(total // -(-total // batch_size) // devices, 1) * devices
    return total // size, size


def iterate_epochs(
    step: Callable, state: Any, constants: Any, rates: np.ndarray, size: int, key: Key,
    tick: Callable[[int, int], None], extra_batch: Callable[[Key], dict[str, jax.Array]] = lambda key: {},
    loss_name: str = "loss", field: str = "defense.learning_rate",
) -> Iterator[tuple[int, Any, dict[str, Any]]]:  # fmt: skip
    """Apply a step to every batch of every epoch, and yield the state after each epoch.

    Args:
      step: a step in the form that :mod:`bdjax.engine.parallel` describes.
      state: pytree; its buffers are donated.
      constants: pytree that every step receives, with "labels" [n] among its entries.
      rates: [epochs, batches], the entry `per_step["rate"]` of every step.
      size: images in a batch.
      key: random key of :func:`bdjax.engine.step.draw`, which draws "index", "augment" and "dropout" of the batches.
      tick: called with (steps done, steps of all epochs) after every step.
      extra_batch: `extra_batch(key)` returns further entries of the batches, [batches, size, ...].
      loss_name: name of metrics["loss"], for the message about a loss that is not finite.
      field: Config field of the learning rate, for the same message.

    Yields:
      (epochs done, state, means of the metrics over the epoch); the state is donated to the next epoch.

    Raises:
      InputError: when the loss becomes NaN or infinite.
    """
    epochs, number = rates.shape
    for epoch in range(epochs):
        epoch_key = jax.random.fold_in(key, epoch)
        batch = {
            **draw(epoch_key, len(constants["labels"]), number, size),
            **extra_batch(jax.random.fold_in(epoch_key, 9)),
        }
        per_step = {"rate": jnp.asarray(rates[epoch], jnp.float32)}
        tick_all = _offset_tick(tick, epoch * number, epochs * number)
        state, metrics = run_epoch(step, state, batch, per_step, constants, tick=tick_all)
        check_finite(metrics["loss"], rates[epoch], epoch * number, loss_name, field)
        yield epoch + 1, state, {name: value.mean() for name, value in metrics.items()}


def run_epochs(
    step: Callable, state: Any, constants: Any, rates: np.ndarray, size: int, key: Key,
    tick: Callable[[int, int], None], on_epoch_end: Callable[[int, Any, dict[str, Any]], None] = lambda *_: None,
    **options: Any,
) -> Any:  # fmt: skip
    """Run all epochs of :func:`iterate_epochs`.

    Args:
      step: a step in the engine's form.
      state: pytree; its buffers are donated.
      constants: pytree that every step receives.
      rates: learning rates [epochs, batches].
      size: images in a batch.
      key: random key that shuffles and augments the images.
      tick: called with (steps done, steps of all epochs) after every step.
      on_epoch_end: called after each epoch with what :func:`iterate_epochs` yields.
      **options: further arguments of :func:`iterate_epochs`.

    Returns:
      The state after the last epoch.

    Raises:
      InputError: when the loss becomes NaN or infinite.
    """
    for result in iterate_epochs(step, state, constants, rates, size, key, tick, **options):
        on_epoch_end(*result)
        state = result[1]
    return state


def round_reporter(
    callback: Callback, before: int = 0, **arrays: Any
) -> Callable[[int, Any, dict[str, Any]], None]:  # fmt: skip
    """Return an `on_epoch_end` of :func:`run_epochs` that reports the model and the metrics to a callback.

    Args:
      callback: receives the report.
      before: number of rounds that were reported earlier.
      **arrays: further arrays of every report.

    Returns:
      A function of (epochs done, state, metrics).
    """

    def report(epochs: int, state: Any, metrics: dict[str, Any]) -> None:
        callback.on_round_end(before + epochs, variables_of(state), **metrics, **arrays)

    return report


def image_arrays(images: Any, labels: Any) -> dict[str, jax.Array]:
    """Return the entries "images" (stored [n, H, W, C]) and "labels" (int32 [n]) of a step's constants."""
    return {"images": jnp.asarray(images), "labels": jnp.asarray(labels)}


def hyper_arrays(config: Any, names: Iterable[str]) -> dict[str, jax.Array]:
    """Return fields of a Config as float32 scalars by name, so that their values do not need recompilation."""
    return {name: jnp.float32(getattr(config, name)) for name in names}


def copy_variables(variables: Variables) -> dict[str, Any]:
    """Return a copy of a model's variables, which may be donated."""
    return {name: jax.tree.map(jnp.array, variables[name]) for name in ("params", "batch_stats")}


def training_state(variables: Variables, optimizer: Name) -> dict[str, Any]:
    """Return the state of a model in training, with copies of its variables, because the state is donated."""
    state = copy_variables(variables)
    return {**state, "opt": direction(optimizer, jnp.float32(0)).init(state["params"])}


def variables_of(state: Any) -> Variables:
    """Return the model's variables in a training state."""
    return {"params": state["params"], "batch_stats": state["batch_stats"]}


def descend(
    state: Any, gradient: Any, stats: Any, optimizer: Name, rate: Any, momentum: Any = None, decay: Any = 0.0
) -> dict[str, Any]:
    """Return the training state after one step of an optimiser.

    Args:
      state: the state before, see :func:`training_state`.
      gradient: of the loss, averaged over the devices.
      stats: the BatchNorm statistics of the new state.
      optimizer: name of the optimiser.
      rate: learning rate.
      momentum: coefficient of the optimiser's momentum, where it has one.
      decay: coefficient of the L2 term: `decay` times the parameters is added to the gradient.

    Returns:
      The state after the step.
    """
    gradient = jax.tree.map(lambda g, p: g + decay * p, gradient, state["params"])
    update, opt = direction(optimizer, momentum).update(gradient, state["opt"])
    params = take_step(state["params"], update, rate)
    return {"params": params, "batch_stats": stats, "opt": opt}


def _offset_tick(tick: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """Return a tick of one epoch that counts its steps from `before` on, of `total`."""
    return lambda done, _: tick(before + done, total)


class _OffsetCallback(ForwardingCallback):
    """A callback that adds an offset to the numbers of the rounds."""

    def __init__(self, callback: Callback, before: int) -> None:
        super().__init__(callback)
        self._before = before

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Forward the round with the offset added to its number."""
        super().on_round_end(self._before + step, variables, **arrays)
