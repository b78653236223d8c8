"""One workload in this process: compilation, seconds, operations, bytes, memory, and the most that the machine does."""

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
from bdjax.engine.epoch import carried
from bdjax.pipelines.environment import environment

_LARGEST = {"cpu": (2048, 1 << 26), "small": (256, 1 << 20)}  # side of a matrix, numbers in an array; by platform


def measure(name: str, suite: str = "cpu", repeats: int = 5, small: bool = False) -> dict[str, Any]:
    """Everything about one workload but its compilation from a cache, JSON-able. The run that compiles is not counted.

    `seconds` are of `repeats` runs; `flops` and `bytes` of one, by XLA's cost analysis (see :func:`_costs`).
    """
    row, job, steps = first_call(name, suite, small)
    seconds = _timed(job.run, repeats)
    row |= {"seconds": seconds, "median": median(seconds), "n": repeats, "rate": job.units / median(seconds)}
    memory, what = _device_peak()
    flops, moved, programs = _costs(job, steps)
    if not memory:
        memory, what = programs, "largest program, by XLA's memory analysis"
    row |= {"flops": flops, "bytes": moved, "peak_memory_bytes": memory, "peak_memory_of": what}
    gc.collect()
    return row | _machine(job.dtype, small) | {"env": environment()}


def first_call(name: str, suite: str, small: bool = False) -> tuple[dict[str, Any], Job, dict]:
    """The workload prepared and run once: what that took to compile, the job, and its steps with how often each ran."""
    job = prepared(name, SMALL if small else SUITES[suite])
    steps: dict[Any, list] = {}

    def count(step: Any, *arguments: Any, **options: Any) -> Any:
        state, split, whole, shared = arguments
        one = jax.tree.map(lambda leaf: leaf[0], (split, whole))
        shapes = jax.tree.map(_shape, (state, *one, shared))
        entry = steps.setdefault((step, str(shapes)), [0, step, shapes])
        entry[0] += jax.tree.leaves(split)[0].shape[0]
        return run_epoch(step, *arguments, **options)

    clock = Clock()
    with carried(count):
        jax.block_until_ready(job.run())
    running, compiling = clock.read()
    row = {"name": name, "unit": job.unit, "units": job.units, "dtype": job.dtype}
    return row | {"first_seconds": running, "compile": compiling}, job, steps


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf), jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
    )


def _costs(job: Job, steps: dict) -> tuple[float, float, int]:
    """(floating-point operations, bytes moved, peak bytes of the largest program) of one run.

    Operations are counted before XLA optimises: a multiply and an add are two, and what another backend's library call
    would hide is in. Bytes are those of the optimised program, of which caches save a part. Both count a step alone
    and multiply by how often it ran, for a loop's body is counted once by XLA.
    """
    parts: list[tuple] = [(times, partial(step, axis=None), shapes, (0,)) for times, step, shapes in steps.values()]
    parts += [(times, function, arguments, ()) for times, function, arguments in job.extra]
    flops, moved, largest = 0.0, 0.0, 0
    with parallel.using(1):
        for times, function, arguments, donated in parts:
            lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
            program = lowered.compile()
            flops += times * float((lowered.cost_analysis() or {}).get("flops", 0))
            moved += times * float(_first(program.cost_analysis()).get("bytes accessed", 0))
            memory: Any = program.memory_analysis()
            if memory is not None:
                sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
                largest = max(largest, int(sizes - memory.alias_size_in_bytes))
    return flops, moved, largest


def _first(analysis: Any) -> dict[str, float]:
    found = analysis[0] if isinstance(analysis, list | tuple) and analysis else analysis
    return found or {}


def _device_peak() -> tuple[int, str]:
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0)), "device"


def _machine(dtype: str, small: bool) -> dict[str, Any]:
    """What one device does at most: operations a second of a square matrix product, bytes a second of an addition.

    The product is taken in float32, for work in bfloat16 also in that, and the faster one counts: a CPU may be slower
    in it. The best of five, for it is to be an upper bound.
    """
    side, numbers = _LARGEST["small" if small else "cpu"]
    if jax.default_backend() != "cpu" and not small:
        side, numbers = 4 * side, 4 * numbers
    found = {}
    for kind in {"float32", dtype}:
        square = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(kind))  # a GPU is faster at equal numbers
        found[kind] = 2 * side**3 / _best(jax.jit(lambda a: a @ a), square)
    moved = jnp.ones(numbers, jnp.float32)
    return {
        "peak_flops": max(found.values()),
        "peak_flops_of": f"{side}x{side} product in {max(found, key=lambda kind: found[kind])}",
        "peak_bytes": 8 * numbers / _best(jax.jit(lambda a: a + 1), moved),
    }


def _best(program: Callable, argument: Any, repeats: int = 5) -> float:
    jax.block_until_ready(program(argument))
    return min(_timed(partial(program, argument), repeats))


def _timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, until what they return is there."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return seconds


def first_step(said: Callable[[str], None]) -> None:
    """Train on the digits until the first step is over, and say so: what a new process costs before it learns."""
    from bdjax import datasets, models
    from bdjax.engine import FitConfig, fit
    from bdjax.types import Callback

    class Until(Callback):
        def tick(self, stage: str, done: int, total: int) -> None:
            said("first step")
            raise _Reached

    data = datasets.load("digits")
    model = models.create("cnn", data.shape, len(data.classes))
    with contextlib.suppress(_Reached):
        fit(model, data.x_train, data.y_train, FitConfig(1), jax.random.key(0), callback=Until())


class _Reached(Exception):
    """The first step is over."""
