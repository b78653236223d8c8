"""One pass over batches, either as a compiled scan or as a Python loop over the same step.

XLA:CPU runs convolution gradients inside `lax.scan` 10 to 50 times slower than outside (jax issue
12868), so "auto" means a loop on a CPU and a scan elsewhere. Both give the same numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal

import jax
import numpy as np

from bdjax.engine import parallel
from bdjax.errors import InputError

Mode = Literal["auto", "scan", "loop"]
_runner: ContextVar[Callable | None] = ContextVar("bdjax_epoch_runner", default=None)


@contextlib.contextmanager
def intercept_epochs(runner: Callable | None) -> Iterator[None]:
    """Within the block, call `runner` in place of :func:`run_epoch`, with the same arguments and result.

    The runner may call :func:`run_epoch` itself. This serves to merge the steps of several runs, or to count them.
    """
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def run_epoch(
    step: Callable,
    state: Any,
    batch: Any,
    per_step: Any,
    constants: Any,
    *,
    mode: Mode = "auto",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, Any]:
    """Apply a step to each batch in turn.

    Args:
      step: `step(state, batch, per_step, constants, axis) -> (state, metrics)` (see :mod:`bdjax.engine.parallel`).
        Pass the same object on every call: another object is compiled again.
      state: pytree; its buffers are donated, so do not use it afterwards.
      batch: pytree of arrays [steps, batch, ...], split over the devices along `batch`.
      per_step: pytree of arrays [steps, ...], replicated on every device.
      constants: pytree, the same at every step, replicated on every device.
      mode: "scan", "loop", or "auto" (a loop on a CPU, else a scan).
      tick: called with (steps done, steps) after every step of a loop, or once after a scan.

    Returns:
      (state, metrics with a leading axis [steps]).
    """
    if (runner := _runner.get()) is not None:
        with intercept_epochs(None):
            return runner(step, state, batch, per_step, constants, mode=mode, tick=tick)
    steps = jax.tree.leaves(batch)[0].shape[0]
    if mode == "scan" or (mode == "auto" and jax.default_backend() != "cpu"):
        state, metrics = parallel.compiled(_scanned(step), batch_axis=1)(state, batch, per_step, constants)
        jax.block_until_ready(metrics)
        tick(steps, steps)
        return state, metrics
    compiled_step, collected = parallel.compiled(step), []
    for index in range(steps):
        of_step = jax.tree.map(lambda leaf, index=index: leaf[index], (batch, per_step))
        state, metrics = compiled_step(state, *of_step, constants)
        collected.append(jax.block_until_ready(metrics))
        tick(index + 1, steps)
    return state, jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *collected)


def check_finite(losses: Any, rates: Any, before: int, what: str, field: str) -> None:
    """Raise InputError for the first loss that is not finite.

    Args:
      losses: [steps].
      rates: learning rates [steps], or one learning rate.
      before: number of steps of earlier epochs, for the message.
      what: name of the loss, for the message.
      field: Config field of the learning rate, for the remedy.

    Raises:
      InputError: when a loss is NaN or infinite.
    """
    losses = np.asarray(losses)
    invalid = np.flatnonzero(~np.isfinite(losses))
    if invalid.size:
        rate = np.broadcast_to(np.asarray(rates), losses.shape)[invalid[0]]
        raise InputError(
            f"the {what} became {losses[invalid[0]]} at step {before + int(invalid[0])} with learning rate {rate:g}. "
            f"Use a smaller {field}, or check the images and labels."
        )


@lru_cache(maxsize=256)
def _scanned(step: Callable) -> Callable:
    """Return a step in the engine's form that scans over the leading axis of `batch` and `per_step`."""

    def scan(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        return jax.lax.scan(lambda s, x: step(s, x[0], x[1], constants, axis), state, (batch, per_step))

    return scan
