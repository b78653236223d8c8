"""Many runs in one program: trainings or purifications of equal shapes, in a loop, by vmap, or one per device.

A run is a function without arguments that calls `fit`, or a method that calls `run_epoch`. Each run has its own thread,
and only one thread works at a time. Once all runs have reached `run_epoch`, their epochs are executed as one program,
and each run continues with its own result. `fit` and the methods need no changes for this.

Runs may differ in all values: seeds, images (poison ratios, triggers), learning rates. They must share the compiled
step and the shapes of its arguments. Arrays that are the *same object* in all runs are not copied.

This is a public building block (docs/performance.md shows its use); within bdjax `bdjax bench` alone uses it. `bdjax
sweep` does not, because each of its cells is a process that may fail, be killed and be started again on its own.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdjax.engine import parallel
from bdjax.engine.epoch import intercept_epochs, run_epoch
from bdjax.errors import InputError

How = Literal["auto", "loop", "vmap", "devices"]
_AXIS = "runs"
T = TypeVar("T")


def run_together(runs: Sequence[Callable[[], T]], how: How = "auto") -> list[T]:
    """Execute several runs and return their results in order.

    Args:
      runs: functions without arguments.
      how: "loop": one after the other, each on all devices in use. "vmap": all runs as one batched step on one device.
        "devices": one run per device. "auto": a loop on a CPU (there, four convolutional networks took 1.5 to 1.75
        times as long under vmap), else one run per device when there are several devices.

    Returns:
      The result of each run.

    Raises:
      InputError: when `how` is unknown or the runs do not share a compiled step. An exception of a run ends all runs
        and is raised again.
    """
    if how not in ("auto", "loop", "vmap", "devices"):
        raise InputError(f"how must be auto, loop, vmap or devices, got {how!r}.")
    if how == "auto":
        how = "devices" if jax.default_backend() != "cpu" and parallel.count() > 1 else "loop"
    if how == "loop" or len(runs) < 2:
        return [run() for run in runs]
    return _Scheduler(runs, how).results()


class _Scheduler:
    """Synchronises the threads of the runs at each epoch; the working thread holds the lock."""

    def __init__(self, runs: Sequence[Callable[[], Any]], how: How) -> None:
        self._runs, self._how, self._devices = runs, how, parallel.count() if how == "devices" else 1
        self._context = contextvars.copy_context()  # merged epochs run in the context of the caller
        self._turn = threading.Condition()
        self._working = len(runs)
        self._waiting: dict[int, tuple] = {}  # arguments of `run_epoch` by run
        self._epoch_results: dict[int, Any] = {}
        self._results: dict[int, Any] = {}
        self._error: BaseException | None = None

    def results(self) -> list[Any]:
        """Start all threads and return the results in order."""
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._work, index), daemon=True)
            for index in range(len(self._runs))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return [self._results[index] for index in range(len(self._runs))]

    def _work(self, index: int) -> None:
        """Body of a thread: execute one run."""
        with self._turn:
            try:
                if self._error is None:
                    with parallel.using(1), intercept_epochs(self._epoch_runner(index)):
                        self._results[index] = self._runs[index]()
            except _Abandoned:
                pass
            except BaseException as error:  # raised again by results()
                self._error = self._error or error
            self._working -= 1
            self._run_if_all_wait()

    def _epoch_runner(self, index: int) -> Callable:
        """Return the replacement of `run_epoch` for one run, which waits until the merged epoch is done."""

        def wait_for_epoch(*arguments: Any, mode: Any, tick: Any) -> Any:
            self._waiting[index] = (*arguments, mode, tick)
            self._run_if_all_wait()
            while index not in self._epoch_results and self._error is None:
                self._turn.wait()
            if self._error is not None:
                raise _Abandoned
            return self._epoch_results.pop(index)

        return wait_for_epoch

    def _run_if_all_wait(self) -> None:
        """Execute the merged epoch once all unfinished runs wait for it."""
        if self._error is None and self._waiting and len(self._waiting) == self._working:
            try:
                waiting = sorted(self._waiting)
                for start in range(0, len(waiting), self._devices if self._how == "devices" else len(waiting)):
                    end = start + self._devices if self._how == "devices" else None
                    group = waiting[start:end]
                    results = self._context.run(_merged_epoch, [self._waiting[i] for i in group], self._how)
                    self._epoch_results |= zip(group, results, strict=True)
            except BaseException as error:  # raised again by results()
                self._error = error
            self._waiting.clear()
        self._turn.notify_all()


class _Abandoned(Exception):
    """Ends a run because another run has failed."""


def _merged_epoch(calls: list[tuple], how: How) -> list[tuple[Any, Any]]:
    """Execute one epoch of several runs, given the arguments of each run's call of `run_epoch`."""
    steps, states, batches, per_steps, constants, modes, ticks = zip(*calls, strict=True)
    _check_alike(steps, [states, batches, per_steps, constants])
    leaves, tree = zip(*(jax.tree.flatten(of_run) for of_run in constants), strict=True)
    groups = list(zip(*leaves, strict=True))
    same = tuple(all(leaf is group[0] for leaf in group) for group in groups)
    stacked = [jnp.stack(group) for group, alike in zip(groups, same, strict=True) if not alike]
    common = [group[0] for group, alike in zip(groups, same, strict=True) if alike]
    state = _stack(states, 0)
    batch, per_step = _stack(batches, 1), _stack(per_steps, 1)
    devices = len(calls) if how == "devices" else 0
    if devices:
        mesh = _mesh(devices)
        put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
        state, stacked, common = put(state, _AXIS), put(stacked, _AXIS), put(common)
        batch, per_step = put(batch, None, _AXIS), put(per_step, None, _AXIS)

    def tick_all(done: int, total: int) -> None:
        for tick in ticks:
            tick(done, total)

    step = _batched_step(steps[0], tree[0], same, devices)
    merged = {"stacked": stacked, "common": common}
    with parallel.using(1):
        state, metrics = run_epoch(step, state, batch, per_step, merged, mode=modes[0], tick=tick_all)
    if devices:  # each run continues on the device that it would use alone
        state, metrics = jax.device_put((state, metrics), jax.local_devices()[0])
    return [_result_of_run(state, metrics, index) for index in range(len(calls))]


def _result_of_run(state: Any, metrics: Any, index: int) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[index], state), jax.tree.map(lambda leaf: leaf[:, index], metrics)


def _stack(trees: Sequence[Any], axis: int) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


@lru_cache(maxsize=64)
def _batched_step(step: Callable, tree: Any, same: tuple[bool, ...], devices: int) -> Callable:
    """Return a step, in the engine's form, of all runs at once: one run per device, or by vmap when `devices` is 0."""

    def step_of_run(state: Any, batch: Any, per_step: Any, stacked: list, common: list) -> tuple[Any, Any]:
        leaves = iter(stacked), iter(common)
        constants = jax.tree.unflatten(tree, [next(leaves[alike]) for alike in same])
        return step(state, batch, per_step, constants, None)

    batched: Callable = jax.vmap(step_of_run, (0, 0, 0, 0, None))
    if devices:

        def on_device(*arguments: Any) -> Any:
            state, batch, per_step, stacked = jax.tree.map(lambda leaf: leaf[0], arguments[:-1])
            result = step_of_run(state, batch, per_step, stacked, arguments[-1])
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], result)

        runs, all_devices = PartitionSpec(_AXIS), PartitionSpec()
        batched = jax.shard_map(
            on_device,
            mesh=_mesh(devices),
            in_specs=(runs, runs, runs, runs, all_devices),
            out_specs=runs,
            check_vma=False,
        )
    return lambda state, batch, per_step, constants, axis: batched(
        state, batch, per_step, constants["stacked"], constants["common"]
    )


@lru_cache(maxsize=8)
def _mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:devices]), (_AXIS,), axis_types=(AxisType.Auto,))


def _check_alike(steps: Sequence[Callable], arguments: list[Sequence[Any]]) -> None:
    """Raise InputError unless the runs have the same step and arguments of the same shapes."""
    remedy = "Merged runs may differ in values only; use how='loop' for these."
    if any(step is not steps[0] for step in steps):
        raise InputError(f"the runs do not share a compiled step (they differ in model, optimizer or method). {remedy}")
    for trees in arguments:
        shapes = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf).name), tree) for tree in trees]
        if any(shape != shapes[0] for shape in shapes):
            raise InputError(f"the runs differ in the shapes of their arrays (images, batch size, epochs). {remedy}")
