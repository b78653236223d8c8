"""Loops with a static number of iterations."""

from collections.abc import Callable
from typing import Any

import jax

UNROLLED = 8
"""Largest number of iterations that is unrolled: XLA:CPU is slow at strided convolutions inside a loop."""


def repeat(step: Callable[[Any], Any], state: Any, times: int) -> Any:
    """Apply `step` repeatedly, unrolled when the loop is short and as a compiled loop otherwise.

    Args:
      step: function of the state; it must keep structure, shapes and dtypes.
      state: initial state, a pytree.
      times: number of applications, a Python integer.

    Returns:
      The state after `times` applications.
    """
    if times <= UNROLLED:
        for _ in range(times):
            state = step(state)
        return state
    return jax.lax.fori_loop(0, times, lambda _, state: step(state), state)
