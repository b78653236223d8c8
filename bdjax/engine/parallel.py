"""Data parallelism: map a per-device step over all devices of all processes. The only module that uses pmap.

A step is `step(state, batch, per_step, constants, axis) -> (state, metrics)`:

- `state` is replicated and its buffers are donated;
- `batch` is split over the devices along its first axis;
- `per_step` (for example the learning rate) and `constants` (data set, hyper-parameters) are replicated;
- `axis` is the name of the mapped axis, or None on a single device. The step itself averages over it
  (:func:`total`, :func:`average`), so that the state stays the same on every device.

With several processes (`jax.distributed`), each process runs the same program with the indices and keys of the full
batch and computes the rows of its own devices. Inputs and outputs of a step are the same in all processes.

There are two forms, tested to agree to 1e-5: "pmap" (the default) and "jit" (one program over a NamedSharding, in which
XLA inserts the collectives and `axis` is None).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bdjax.errors import InputError

AXIS = "data"
Form = Literal["pmap", "jit"]
_plan: ContextVar[tuple[int, Form]] = ContextVar("bdjax_devices", default=(0, "pmap"))


@contextlib.contextmanager
def using(devices: int = 0, form: Form = "pmap") -> Iterator[None]:
    """Within the block, run steps on the first `devices` local devices.

    Args:
      devices: number of devices; 0: all devices, including those of other processes.
      form: "pmap" or "jit", see the module's docstring.

    Raises:
      InputError: when this process has fewer devices.
    """
    have = jax.local_device_count()
    if devices > have:
        raise InputError(f"devices={devices} was asked for, but this process has {have}. Use 0 for all of them.")
    token = _plan.set((devices, form))
    try:
        yield
    finally:
        _plan.reset(token)


def count() -> int:
    """Return the number of devices that a step is mapped over."""
    return _plan.get()[0] or jax.device_count()


def total(tree: Any, axis: str | None) -> Any:
    """Sum a pytree over the devices; return it unchanged when `axis` is None."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def average(tree: Any, axis: str | None) -> Any:
    """Average a pytree over the devices; return it unchanged when `axis` is None."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def all_gather(tree: Any, axis: str | None) -> Any:
    """Concatenate leaves [n, ...] of all devices to [devices * n, ...]; return the tree unchanged without `axis`."""
    return tree if axis is None else jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True), tree)


def size(axis: str | None) -> int:
    """Return the number of devices on `axis`, 1 when it is None."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def check_batch(batch_size: int) -> None:
    """Raise InputError when `batch_size` images cannot be split evenly over the devices."""
    if batch_size % count():
        raise InputError(
            f"batch_size={batch_size} cannot be split evenly over {count()} devices. "
            f"Use a multiple of {count()}, or fewer devices (--devices 1)."
        )


def compiled(step: Callable, batch_axis: int = 0) -> Callable:
    """Compile a step for the devices in use.

    The result is cached, so the same step on the same devices is compiled once.

    Args:
      step: a step as described above.
      batch_axis: axis of the leaves of `batch` that is split over the devices.

    Returns:
      `f(state, batch, per_step, constants) -> (state, metrics)`.
    """
    devices, form = count(), _plan.get()[1]
    return _compiled(step, batch_axis, devices, form)


@lru_cache(maxsize=256)
def _compiled(step: Callable, batch_axis: int, devices: int, form: Form) -> Callable:
    if devices == 1:
        return jax.jit(partial(step, axis=None), donate_argnums=0)
    if form == "jit":
        return _sharded(step, batch_axis, devices)
    here = jax.local_device_count()
    distributed = devices > here
    mapped = jax.pmap(
        partial(step, axis=AXIS),
        axis_name=AXIS,
        in_axes=(None, batch_axis, None, None),
        out_axes=(None, None),
        donate_argnums=() if distributed else 0,  # across processes jax uses a donated state twice
        devices=None if distributed else jax.local_devices()[:devices],
    )

    def split(leaf: Any) -> Any:
        shape = leaf.shape
        rows = leaf.reshape(*shape[:batch_axis], devices, shape[batch_axis] // devices, *shape[batch_axis + 1 :])
        if not distributed:
            return rows
        local = slice(jax.process_index() * here, (jax.process_index() + 1) * here)
        return rows[(slice(None),) * batch_axis + (local,)]

    return lambda state, batch, per_step, constants: mapped(state, jax.tree.map(split, batch), per_step, constants)


def _sharded(step: Callable, batch_axis: int, devices: int) -> Callable:
    """Compile a step as one program over a mesh; XLA inserts the collectives."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:devices]), (AXIS,), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(*([None] * batch_axis), AXIS))
    return jax.jit(
        partial(step, axis=None),
        in_shardings=(replicated, split, replicated, replicated),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
    )
