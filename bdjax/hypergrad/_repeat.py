"""Loops of a known length."""

from collections.abc import Callable
from typing import Any

import jax

UNROLLED = 8
"""Steps up to which a loop is written out: XLA:CPU is slow at strided convolutions inside a loop."""


def repeat(step: Callable[[Any], Any], state: Any, times: int) -> Any:
    """`step` applied `times` times, written out when short, a compiled loop when long."""
    if times <= UNROLLED:
        for _ in range(times):
            state = step(state)
        return state
    return jax.lax.fori_loop(0, times, lambda _, state: step(state), state)
