"""Data parallelism: one per-device step, mapped over all devices of all processes; the only user of pmap.

A step is `step(state, split, whole, shared, axis) -> (state, metrics)`:

- `state` is replicated and donated; `split` is the batch, cut along its first axis; `whole` belongs to
  the step (learning rate), `shared` to the run (data set, hyper-parameters): both are replicated;
- `axis` is the name of the mapped axis, or None on a single device. The step itself averages over it
  (:func:`total`, :func:`average`), so that every device ends with the same state.

Where several processes train together (`jax.distributed`), each runs the same program on the whole batch's indices and
keys, and computes its own devices' rows of them; everything that a step is given and gives is the same in all.

Two forms are equal to 1e-5 and tested to be: "pmap" (the default) and "jit" (one program over a
NamedSharding, in which XLA places the collectives and `axis` is None).
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
    """Within the block, steps run on the first `devices` local devices (0: all of them, those of other processes too).

    Raises InputError when the machine has fewer.
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
    """How many devices a step is mapped over."""
    return _plan.get()[0] or jax.device_count()


def total(tree: Any, axis: str | None) -> Any:
    """Sum of a pytree over the devices; the tree itself when `axis` is None."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def average(tree: Any, axis: str | None) -> Any:
    """Mean of a pytree over the devices; the tree itself when `axis` is None."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def all_gather(tree: Any, axis: str | None) -> Any:
    """The leaves [n, ...] of all devices in their order, [devices * n, ...]; the tree itself when `axis` is None."""
    return tree if axis is None else jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True), tree)


def size(axis: str | None) -> int:
    """Number of devices on `axis`, 1 when it is None."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def check_batch(batch_size: int) -> None:
    """Raise InputError when `batch_size` images cannot be cut evenly over the devices."""
    if batch_size % count():
        raise InputError(
            f"batch_size={batch_size} cannot be split evenly over {count()} devices. "
            f"Use a multiple of {count()}, or fewer devices (--devices 1)."
        )


def compiled(step: Callable, batch_axis: int = 0) -> Callable:
    """`step` compiled for the devices in use; `batch_axis` is the axis of `split` that is cut.

    The same step on the same devices gives the same compiled program, so nothing is compiled twice.
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
    shared = devices > here
    mapped = jax.pmap(
        partial(step, axis=AXIS),
        axis_name=AXIS,
        in_axes=(None, batch_axis, None, None),
        out_axes=(None, None),
        donate_argnums=() if shared else 0,  # between processes jax uses a donated state twice
        devices=None if shared else jax.local_devices()[:devices],
    )

    def cut(leaf: Any) -> Any:
        shape = leaf.shape
        rows = leaf.reshape(*shape[:batch_axis], devices, shape[batch_axis] // devices, *shape[batch_axis + 1 :])
        if not shared:
            return rows
        own = slice(jax.process_index() * here, (jax.process_index() + 1) * here)
        return rows[(slice(None),) * batch_axis + (own,)]

    return lambda state, split, whole, shared: mapped(state, jax.tree.map(cut, split), whole, shared)


def _sharded(step: Callable, batch_axis: int, devices: int) -> Callable:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:devices]), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    cut = NamedSharding(mesh, PartitionSpec(*([None] * batch_axis), AXIS))
    return jax.jit(
        partial(step, axis=None),
        in_shardings=(everywhere, cut, everywhere, everywhere),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
