"""What the clock counts: seconds, compilation apart from them, and the peak of memory."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.engine import clock as clock_module
from bdjax.engine.clock import Clock, compiled_programs, peak_memory


@pytest.fixture
def time(monkeypatch):
    """A `time` that moves when it is told to, and a way to report a compilation that just ended."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(clock_module, "_spans", [])
    monkeypatch.setattr(clock_module, "_programs", [0])
    now.compiled = lambda seconds, event=-1: clock_module._listen(clock_module._EVENTS[event], seconds)
    return now


def test_the_clock_counts_compilation_apart_and_nested_tracing_once(time):
    clock = Clock()
    time.seconds += 5
    time.compiled(1.0, event=0)  # an inner function was traced ...
    time.seconds += 1
    time.compiled(3.0, event=0)  # ... while an outer one was
    time.compiled(0.5, event=-1)
    assert clock.read() == pytest.approx((3, 3)) and compiled_programs() == 1


def test_what_happens_while_the_clock_is_stopped_does_not_count(time):
    clock = Clock()
    time.seconds += 5
    for _ in range(2):
        with clock:
            time.seconds += 7
            time.compiled(2.0)
    time.seconds += 1
    assert clock.read() == pytest.approx((6, 0))


def test_a_real_compilation_is_counted_once():
    clock, before = Clock(), compiled_programs()
    function = jax.jit(lambda x: jnp.sin(x) * 3)
    function(np.float32(1))
    running, compiling = clock.read()
    assert compiled_programs() == before + 1 and compiling > 0 and running >= 0
    function(np.float32(2))
    assert compiled_programs() == before + 1 and clock.read()[1] == compiling


def test_the_peak_of_memory_is_told_with_what_it_is():
    size, what = peak_memory()
    assert size > 1 << 20 and what in ("device", "process resident set")
