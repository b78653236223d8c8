"""What the machine is, and the most that it does: the ceilings that other numbers are set beside."""

import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from accelerator.records import Run
from bdjax.cli._devices import prepare_jax
from bdjax.pipelines.environment import environment

_CALLS = 20  # of a program between two readings of the clock
_REPEATS = 5


def machine(run: Run) -> None:
    """Versions and card; matrix products on random numbers, and copies on the device and to it."""
    prepare_jax()
    run.record("environment", **environment(), memory=_memory(), smi=_nvidia_smi())
    side, numbers = (256, 2**16) if run.smoke else (8192, 2**28)
    precisions: list[tuple[Any, str]] = [(jnp.bfloat16, "default"), (jnp.float32, "default"), (jnp.float32, "highest")]
    for dtype, precision in precisions:
        keys = jax.random.split(jax.random.key(0))
        left, right = (jax.random.normal(key, (side, side)).astype(dtype) for key in keys)
        product = jax.jit(partial(jnp.matmul, precision=precision))
        seconds = _seconds(partial(product, left, right))
        name, flops = jnp.dtype(dtype).name, 2 * side**3
        run.record("product", dtype=name, precision=precision, side=side, n=_REPEATS, **_rate(seconds, flops, "flops"))
    array = jax.random.normal(jax.random.key(1), (numbers,))
    seconds = _seconds(partial(jax.jit(jnp.negative), array))
    run.record("copy on the device", bytes=8 * numbers, n=_REPEATS, **_rate(seconds, 8 * numbers, "bytes_per_second"))
    _transfers(run, np.asarray(array[: numbers // 4]))


def _seconds(call: Callable[[], jax.Array]) -> list[float]:
    """Seconds of one call, several times, each the mean of calls in a row after two that do not count."""
    jax.block_until_ready([call(), call()])
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        for _ in range(_CALLS):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - begin) / _CALLS)
    return seconds


def _rate(seconds: list[float], units: float, name: str) -> dict[str, Any]:
    """The median rate and the spread of the seconds."""
    return {name: units / median(seconds), "seconds": median(seconds), "least": min(seconds), "most": max(seconds)}


def _transfers(run: Run, array: np.ndarray) -> None:
    """From the host's memory to the device's and back."""
    sent, fetched = [], []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        there = jax.block_until_ready(jax.device_put(array))
        middle = time.perf_counter()
        np.array(there)
        sent.append(middle - begin)
        fetched.append(time.perf_counter() - middle)
    for what, seconds in (("to the device", sent), ("from the device", fetched)):
        run.record(what, bytes=array.nbytes, n=_REPEATS, **_rate(seconds, array.nbytes, "bytes_per_second"))


def _memory() -> int | None:
    """Bytes that JAX may use on the device, where it tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _nvidia_smi() -> str | None:
    """Name, driver, memory, clocks and power limit by nvidia-smi; None without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    command = [program, f"--query-gpu={asked}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or None
