"""Wall time with compilation apart, and the peak of memory."""

import resource
import sys
import time

import jax

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_spans: list[tuple[float, float]] = []  # disjoint (begin, end) spent tracing, lowering and compiling
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
    """How many programs this process has compiled or fetched from the persistent cache."""
    return _programs[0]


def _compiling() -> float:
    return sum(end - begin for begin, end in _spans)


class Clock:
    """Seconds since it was made, without compilation and without what ran while it was stopped."""

    def __init__(self) -> None:
        """Starts at once."""
        self._began, self._compile = time.perf_counter(), _compiling()
        self._stopped = self._stopped_compile = self._since = self._since_compile = 0.0

    def __enter__(self) -> None:
        """Stop the clock for a `with` block: what is measured inside is not the method's time."""
        self._since, self._since_compile = time.perf_counter(), _compiling()

    def __exit__(self, *_: object) -> None:
        """Go on."""
        self._stopped += time.perf_counter() - self._since
        self._stopped_compile += _compiling() - self._since_compile

    def read(self) -> tuple[float, float]:
        """(seconds of running, seconds of tracing and compiling), both without the stops."""
        compiling = _compiling() - self._compile - self._stopped_compile
        running = time.perf_counter() - self._began - self._stopped - compiling
        return max(running, 0.0), max(compiling, 0.0)


def peak_memory() -> tuple[int, str]:
    """(bytes, what they are): the device's peak where it tells, else the process's peak resident set."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"]), "device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process resident set"
