"""What a computing command sets up: jax's devices and compilation cache, several processes, a profile, a Context."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdjax.cli._options import ClusterFlags
from bdjax.cli._output import say
from bdjax.errors import InputError


@contextlib.contextmanager
def run_context(options: Any) -> Iterator[Any]:
    """Set up jax, the progress bar and the profiler as the flags say, and yield the Context of the computation.

    Raises InputError when jax has no device or the processes cannot connect.
    """
    _configure_cache()
    join_cluster(options)
    _check_devices()
    from bdjax.pipelines.context import Context
    from bdjax.reports.progress import bar

    with bar() as tick, _profile(getattr(options, "profile", None)):
        yield Context(getattr(options, "devices", 0), tick, getattr(options, "estimate", True), say=say)


def prepare_jax() -> None:
    """Configure jax's compilation cache and check that there is a device. Raises InputError when there is none."""
    _configure_cache()
    _check_devices()


def device_error(error: BaseException) -> str:
    """Return in one line why jax has no device, and the remedy."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    reason = (str(error).splitlines() or [""])[0].partition(" (set JAX_PLATFORMS")[0] or type(error).__name__
    subject = f"JAX_PLATFORMS={platforms} names a device that" if platforms else "there is no device that"
    return (
        f"{subject} jax cannot use ({reason[:300]}). Set JAX_PLATFORMS=cpu or leave it empty; for an accelerator, "
        "install its jax (pip install 'bdjax[cuda13]', 'bdjax[cuda12]' or 'bdjax[tpu]') and a matching driver."
    )


def join_cluster(options: Any) -> None:
    """Connect this process to the others that train the same model, where the flags of a cluster are set.

    Raises InputError when the flags contradict each other or the processes cannot connect.
    """
    if not isinstance(options, ClusterFlags):
        return
    coordinator, processes, process, slurm = options.coordinator, options.processes, options.process, options.slurm
    if not coordinator and not slurm:
        if processes or process >= 0:
            raise InputError("--processes and --process need --coordinator HOST:PORT, the address of process 0.")
        return
    if slurm and coordinator:
        raise InputError("--slurm and --coordinator exclude each other. Give one of them.")
    if coordinator and not (":" in coordinator and processes >= 1 and 0 <= process < processes):
        raise InputError(
            f"--coordinator {coordinator} needs the form HOST:PORT, --processes of at least 1 and --process from 0 to "
            f"one less; got --processes {processes} --process {process}."
        )
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if slurm:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"jax.distributed failed to initialise: {str(error).splitlines()[0]}") from None


def _check_devices() -> None:
    """Raise InputError when jax finds no device of the kind that JAX_PLATFORMS names."""
    import jax

    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where a CUDA build of jaxlib is missing
        raise InputError(device_error(error)) from None


def _configure_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdjax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def _profile(directory: Path | None) -> Iterator[None]:
    """Write a profiler trace of the block to a directory; None: do not profile."""
    if directory is None:
        yield
        return
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--profile {directory} is a file. Give the name of a directory.")
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # events of Python calls would hide those of the devices
    with jax.profiler.trace(directory, profiler_options=options):
        yield
