"""Many runs in one program: several trainings or purifications that share shapes, by a loop, by vmap, or one a device.

A run is a function without arguments that calls `fit`, or a method that calls `run_epoch`. Each has a thread of its
own, of which one works at a time; where all of them have come to `run_epoch`, the epoch of all is carried out as one
program, and each goes on with its own result. So neither `fit` nor a method knows of it.

Runs may differ in every value: seeds, images (poison ratios, triggers), learning rates. They must share what is
compiled: the step, and the shapes of its arguments. Arrays that are the *same object* in all runs are not copied.
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
from bdjax.engine.epoch import carried, run_epoch
from bdjax.errors import InputError

How = Literal["auto", "loop", "vmap", "devices"]
_AXIS = "runs"
T = TypeVar("T")


def run_together(runs: Sequence[Callable[[], T]], how: How = "auto") -> list[T]:
    """The results of `runs`, in their order.

    Args:
      how: "loop": one after the other, each on all devices in use. "vmap": the runs as one batched step on one device.
        "devices": one run a device, so many at a time. "auto": a loop on a CPU (there four convolutional networks took
        1.5 to 1.75 times as long under vmap), else one a device where there are several.

    Raises InputError when the runs do not share a compiled step, and whatever a run raises; the others end with it.
    """
    if how not in ("auto", "loop", "vmap", "devices"):
        raise InputError(f"how must be auto, loop, vmap or devices, got {how!r}.")
    if how == "auto":
        how = "devices" if jax.default_backend() != "cpu" and parallel.count() > 1 else "loop"
    if how == "loop" or len(runs) < 2:
        return [run() for run in runs]
    return _Meeting(runs, how).results()


class _Meeting:
    """Where the threads of the runs wait for each other. Its lock is held by the one that works."""

    def __init__(self, runs: Sequence[Callable[[], Any]], how: How) -> None:
        self._runs, self._how, self._devices = runs, how, parallel.count() if how == "devices" else 1
        self._context = contextvars.copy_context()  # an epoch of all is one of whoever asked for the runs
        self._turn = threading.Condition()
        self._working = len(runs)
        self._waiting: dict[int, tuple] = {}
        self._answers: dict[int, Any] = {}
        self._found: dict[int, Any] = {}
        self._error: BaseException | None = None

    def results(self) -> list[Any]:
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._work, place), daemon=True)
            for place in range(len(self._runs))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return [self._found[place] for place in range(len(self._runs))]

    def _work(self, place: int) -> None:
        with self._turn:
            try:
                if self._error is None:
                    with parallel.using(1), carried(self._carrier(place)):
                        self._found[place] = self._runs[place]()
            except _Abandoned:
                pass
            except BaseException as error:  # raised again by results()
                self._error = self._error or error
            self._working -= 1
            self._meet()

    def _carrier(self, place: int) -> Callable:
        def carry(*arguments: Any, mode: Any, tick: Any) -> Any:
            self._waiting[place] = (*arguments, mode, tick)
            self._meet()
            while place not in self._answers and self._error is None:
                self._turn.wait()
            if self._error is not None:
                raise _Abandoned
            return self._answers.pop(place)

        return carry

    def _meet(self) -> None:
        """Carry out the epoch of all when nobody is on the way any more; a run that has ended is not waited for."""
        if self._error is None and self._waiting and len(self._waiting) == self._working:
            try:
                places = sorted(self._waiting)
                for start in range(0, len(places), self._devices if self._how == "devices" else len(places)):
                    end = start + self._devices if self._how == "devices" else None
                    part = places[start:end]
                    found = self._context.run(_epoch, [self._waiting[p] for p in part], self._how)
                    self._answers |= zip(part, found, strict=True)
            except BaseException as error:  # raised again by results()
                self._error = error
            self._waiting.clear()
        self._turn.notify_all()


class _Abandoned(Exception):
    """Another run has failed."""


def _epoch(asked: list[tuple], how: How) -> list[tuple[Any, Any]]:
    """One epoch of each run, of the arguments that each gave to `run_epoch`."""
    steps, states, splits, wholes, shares, modes, ticks = zip(*asked, strict=True)
    _check_alike(steps, [states, splits, wholes, shares])
    leaves, tree = zip(*(jax.tree.flatten(shared) for shared in shares), strict=True)
    groups = list(zip(*leaves, strict=True))
    same = tuple(all(leaf is group[0] for leaf in group) for group in groups)
    own = [jnp.stack(group) for group, alike in zip(groups, same, strict=True) if not alike]
    common = [group[0] for group, alike in zip(groups, same, strict=True) if alike]
    state = _stacked(states, 0)
    split, whole = _stacked(splits, 1), _stacked(wholes, 1)
    devices = len(asked) if how == "devices" else 0
    if devices:
        mesh = _mesh(devices)
        put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
        state, own, common = put(state, _AXIS), put(own, _AXIS), put(common)
        split, whole = put(split, None, _AXIS), put(whole, None, _AXIS)

    def tell(done: int, total: int) -> None:
        for tick in ticks:
            tick(done, total)

    step = _lifted(steps[0], tree[0], same, devices)
    with parallel.using(1):
        state, metrics = run_epoch(step, state, split, whole, {"own": own, "common": common}, mode=modes[0], tick=tell)
    if devices:  # what a run does next, it does where it would alone
        state, metrics = jax.device_put((state, metrics), jax.local_devices()[0])
    return [_own(state, metrics, place) for place in range(len(asked))]


def _own(state: Any, metrics: Any, place: int) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[place], state), jax.tree.map(lambda leaf: leaf[:, place], metrics)


def _stacked(trees: Sequence[Any], axis: int) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


@lru_cache(maxsize=64)
def _lifted(step: Callable, tree: Any, same: tuple[bool, ...], devices: int) -> Callable:
    """A step, in the engine's form, of all runs at once; `devices`: one run on each of so many, 0: by vmap."""

    def one(state: Any, split: Any, whole: Any, own: list, common: list) -> tuple[Any, Any]:
        rest = iter(own), iter(common)
        shared = jax.tree.unflatten(tree, [next(rest[alike]) for alike in same])
        return step(state, split, whole, shared, None)

    batched: Callable = jax.vmap(one, (0, 0, 0, 0, None))
    if devices:

        def alone(*arguments: Any) -> Any:
            state, split, whole, own = jax.tree.map(lambda leaf: leaf[0], arguments[:-1])
            found = one(state, split, whole, own, arguments[-1])
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], found)

        runs, everywhere = PartitionSpec(_AXIS), PartitionSpec()
        batched = jax.shard_map(
            alone, mesh=_mesh(devices), in_specs=(runs, runs, runs, runs, everywhere), out_specs=runs, check_vma=False
        )
    return lambda state, split, whole, shared, axis: batched(state, split, whole, shared["own"], shared["common"])


@lru_cache(maxsize=8)
def _mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:devices]), (_AXIS,), axis_types=(AxisType.Auto,))


def _check_alike(steps: Sequence[Callable], arguments: list[Sequence[Any]]) -> None:
    remedy = "Runs that are carried out together differ in values alone: take the others by how='loop'."
    if any(step is not steps[0] for step in steps):
        raise InputError(f"the runs do not have one compiled step (another model, optimizer or method). {remedy}")
    for trees in arguments:
        shapes = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf).name), tree) for tree in trees]
        if any(shape != shapes[0] for shape in shapes):
            raise InputError(f"the runs differ in the shapes of their arrays (images, batch size, epochs). {remedy}")
