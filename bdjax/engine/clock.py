"""Wall time with compilation measured separately, and peak memory."""

import resource
import sys
import time

import jax

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_spans: list[tuple[float, float]] = []  # disjoint (begin, end) of tracing, lowering and compiling
_programs = [0]


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event not in _EVENTS:
        return
    _programs[0] += event == _EVENTS[-1]
    end = time.perf_counter()
    begin = end - duration_secs
    while _spans and _spans[-1][0] >= begin:  # an inner function's tracing is part of the outer's
        _spans.pop()
    _spans.append((max(begin, _spans[-1][1]) if _spans else begin, end))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_programs() -> int:
    """Return the number of programs that this process compiled or loaded from the persistent cache."""
    return _programs[0]


def _compiling() -> float:
    """Seconds of tracing, lowering and compiling so far."""
    return sum(end - begin for begin, end in _spans)


class Clock:
    """Stopwatch that separates running time from compilation and can be stopped by a `with` block."""

    def __init__(self) -> None:
        """Start the clock."""
        self._began, self._compile = time.perf_counter(), _compiling()
        self._stopped = self._stopped_compile = self._since = self._since_compile = 0.0

    def __enter__(self) -> None:
        """Stop the clock for a `with` block, so that measurements inside do not count."""
        self._since, self._since_compile = time.perf_counter(), _compiling()

    def __exit__(self, *_: object) -> None:
        """Continue after the `with` block."""
        self._stopped += time.perf_counter() - self._since
        self._stopped_compile += _compiling() - self._since_compile

    def read(self) -> tuple[float, float]:
        """Return (running seconds, seconds of tracing and compiling), both without the stopped intervals."""
        compiling = _compiling() - self._compile - self._stopped_compile
        running = time.perf_counter() - self._began - self._stopped - compiling
        return max(running, 0.0), max(compiling, 0.0)


def peak_memory() -> tuple[int, str]:
    """Return (bytes, kind): the peak of the device if it reports one, else the peak resident set of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"]), "device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process resident set"
