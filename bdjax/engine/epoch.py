"""One pass over batches with the same body as a compiled scan or as a Python loop.

XLA:CPU runs convolution gradients inside `lax.scan` 10 to 50 times slower than outside (jax issue
12868), so "auto" loops on a CPU and scans elsewhere; both give the same numbers.
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
_carrier: ContextVar[Callable | None] = ContextVar("bdjax_carrier", default=None)


@contextlib.contextmanager
def carried(by: Callable | None) -> Iterator[None]:
    """Within the block, `by` is called in place of :func:`run_epoch`, with its arguments, and gives the result.

    It may call :func:`run_epoch` itself. So the steps of several runs are brought together, or counted.
    """
    token = _carrier.set(by)
    try:
        yield
    finally:
        _carrier.reset(token)


def run_epoch(
    step: Callable,
    state: Any,
    split: Any,
    whole: Any,
    shared: Any,
    *,
    mode: Mode = "auto",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, Any]:
    """Apply `step` (see :mod:`bdjax.engine.parallel`) to each batch in turn.

    Args:
      step: must be the same object from run to run, or it is compiled anew.
      state: pytree, donated: do not use it afterwards.
      split: pytree of [steps, batch, ...], cut over the devices along `batch`.
      whole: pytree of [steps, ...], given to every device.
      shared: pytree, the same at every step.
      tick: called with (steps done, steps), after every step of a loop, once after a scan.

    Returns:
      (state, metrics with a leading axis [steps]).
    """
    if (carrier := _carrier.get()) is not None:
        with carried(None):
            return carrier(step, state, split, whole, shared, mode=mode, tick=tick)
    steps = jax.tree.leaves(split)[0].shape[0]
    if mode == "scan" or (mode == "auto" and jax.default_backend() != "cpu"):
        state, metrics = parallel.compiled(_scanned(step), batch_axis=1)(state, split, whole, shared)
        jax.block_until_ready(metrics)
        tick(steps, steps)
        return state, metrics
    one, collected = parallel.compiled(step), []
    for index in range(steps):
        at = jax.tree.map(lambda leaf, index=index: leaf[index], (split, whole))
        state, metrics = one(state, *at, shared)
        collected.append(jax.block_until_ready(metrics))
        tick(index + 1, steps)
    return state, jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *collected)


def check_finite(losses: Any, rates: Any, before: int, what: str, field: str) -> None:
    """Raise InputError for the first loss that is not finite.

    Args: losses [steps]; rates [steps] or one learning rate; before: steps of earlier epochs;
    what: names the quantity; field: the Config field that the remedy is about.
    """
    losses = np.asarray(losses)
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        rate = np.broadcast_to(np.asarray(rates), losses.shape)[bad[0]]
        raise InputError(
            f"the {what} became {losses[bad[0]]} at step {before + int(bad[0])} with learning rate {rate:g}. "
            f"Use a smaller {field}, or check the images and labels."
        )


@lru_cache(maxsize=256)
def _scanned(step: Callable) -> Callable:
    def run(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        return jax.lax.scan(lambda s, x: step(s, x[0], x[1], shared, axis), state, (split, whole))

    return run
