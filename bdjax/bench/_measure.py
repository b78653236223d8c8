"""Measure one workload in this process: compile time, seconds, operations, bytes, memory, and machine peaks."""

import contextlib
import gc
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.bench.workloads import SMALL, SUITES, Job
from bdjax.bench.workloads import job as prepared
from bdjax.engine import parallel, run_epoch
from bdjax.engine.clock import Clock
from bdjax.engine.epoch import intercept_epochs
from bdjax.pipelines.environment import environment

_LARGEST = {
    "cpu": (2048, 1 << 26),
    "small": (256, 1 << 20),
}  # (side of the square matrix, length of the array) for the peaks of the machine


def measure(name: str, suite: str = "cpu", repeats: int = 5, small: bool = False) -> dict[str, Any]:
    """Measure one workload; the first run, which compiles, is not timed.

    Args:
      name: workload, one of :data:`bdjax.bench.NAMES`.
      suite: "cpu" or "gpu".
      repeats: number of timed runs.
      small: use tiny sizes.

    Returns:
      A row of JSON values: "seconds" of each run, their "median", "rate" in units per second, "flops" and "bytes" of
      one run by XLA's cost analysis (see :func:`_costs`), peak memory, peaks of the machine, and "env".
    """
    row, job, steps = first_call(name, suite, small)
    seconds = _timed(job.run, repeats)
    row |= {"seconds": seconds, "median": median(seconds), "n": repeats, "rate": job.units / median(seconds)}
    memory, memory_of = _device_peak()
    flops, moved, programs = _costs(job, steps)
    if not memory:
        memory, memory_of = programs, "largest program, by XLA's memory analysis"
    row |= {"flops": flops, "bytes": moved, "peak_memory_bytes": memory, "peak_memory_of": memory_of}
    gc.collect()
    return row | _machine(job.dtype, small) | {"env": environment()}


def first_call(name: str, suite: str, small: bool = False) -> tuple[dict[str, Any], Job, dict]:
    """Prepare a workload and run it once.

    Args:
      name: workload, one of :data:`bdjax.bench.NAMES`.
      suite: "cpu" or "gpu".
      small: use tiny sizes.

    Returns:
      (row with the compile time, the job, its steps as {key: [number of executions, step, shapes of its arguments]}).
    """
    job = prepared(name, SMALL if small else SUITES[suite])
    steps: dict[Any, list] = {}

    def count(step: Any, *arguments: Any, **options: Any) -> Any:
        state, batch, per_step, constants = arguments
        of_step = jax.tree.map(lambda leaf: leaf[0], (batch, per_step))
        shapes = jax.tree.map(_shape, (state, *of_step, constants))
        entry = steps.setdefault((step, str(shapes)), [0, step, shapes])
        entry[0] += jax.tree.leaves(batch)[0].shape[0]
        return run_epoch(step, *arguments, **options)

    clock = Clock()
    with intercept_epochs(count):
        jax.block_until_ready(job.run())
    running, compiling = clock.read()
    row = {"name": name, "unit": job.unit, "units": job.units, "dtype": job.dtype}
    return row | {"first_seconds": running, "compile": compiling}, job, steps


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf), jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
    )


def _costs(job: Job, steps: dict) -> tuple[float, float, int]:
    """Return (floating-point operations, bytes moved, peak bytes of the largest program) of one run.

    Operations are counted before XLA's optimisation, so that library calls are included; a multiplication and an
    addition are two operations. Bytes are those of the optimised program, without the effect of caches. Both are
    counted for a single step and multiplied by its number of executions, because XLA counts the body of a loop once.
    """
    parts: list[tuple] = [(times, partial(step, axis=None), shapes, (0,)) for times, step, shapes in steps.values()]
    parts += [(times, function, arguments, ()) for times, function, arguments in job.extra]
    flops, moved, largest = 0.0, 0.0, 0
    with parallel.using(1):
        for times, function, arguments, donated in parts:
            lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
            program = lowered.compile()
            flops += times * float((lowered.cost_analysis() or {}).get("flops", 0))
            moved += times * float(_first_analysis(program.cost_analysis()).get("bytes accessed", 0))
            memory: Any = program.memory_analysis()
            if memory is not None:
                sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
                largest = max(largest, int(sizes - memory.alias_size_in_bytes))
    return flops, moved, largest


def _first_analysis(analysis: Any) -> dict[str, float]:
    """Return the first cost analysis, which jax gives as a dictionary, a list or None."""
    first = analysis[0] if isinstance(analysis, list | tuple) and analysis else analysis
    return first or {}


def _device_peak() -> tuple[int, str]:
    """Return (peak bytes of the device, "device"); 0 where the device does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0)), "device"


def _machine(dtype: str, small: bool) -> dict[str, Any]:
    """Measure peaks of one device: operations per second of a matrix product, bytes per second of an addition.

    The product is measured in float32 and, for a workload in bfloat16, also in bfloat16; the faster one counts, because
    a CPU may be slower in bfloat16. The best of five measurements is taken, as an upper bound.
    """
    side, numbers = _LARGEST["small" if small else "cpu"]
    if jax.default_backend() != "cpu" and not small:
        side, numbers = 4 * side, 4 * numbers
    rates = {}
    for kind in {"float32", dtype}:
        square = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(kind))  # a GPU is faster on constant data
        rates[kind] = 2 * side**3 / _best(jax.jit(lambda a: a @ a), square)
    moved = jnp.ones(numbers, jnp.float32)
    return {
        "peak_flops": max(rates.values()),
        "peak_flops_of": f"{side}x{side} product in {max(rates, key=lambda kind: rates[kind])}",
        "peak_bytes": 8 * numbers / _best(jax.jit(lambda a: a + 1), moved),
    }


def _best(program: Callable, argument: Any, repeats: int = 5) -> float:
    """Return the smallest seconds of `repeats` executions."""
    jax.block_until_ready(program(argument))
    return min(_timed(partial(program, argument), repeats))


def _timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` runs, until their results are ready."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return seconds


def first_step(say: Callable[[str], None]) -> None:
    """Train on the digits until the first step is finished, then call `say`: measures the start of a process."""
    from bdjax import datasets, models
    from bdjax.engine import FitConfig, fit
    from bdjax.types import Callback

    class StopAtFirstStep(Callback):
        def on_progress(self, stage: str, done: int, total: int) -> None:
            say("first step")
            raise _FirstStepDone

    data = datasets.load("digits")
    model = models.create("cnn", data.shape, len(data.classes))
    with contextlib.suppress(_FirstStepDone):
        fit(model, data.x_train, data.y_train, FitConfig(1), jax.random.key(0), callback=StopAtFirstStep())


class _FirstStepDone(Exception):
    """The first step is finished."""
