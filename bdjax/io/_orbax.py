"""Save and load pytrees of arrays with Orbax. The only module that imports Orbax."""

import contextlib
import gc
import glob
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from bdjax.errors import InputError
from bdjax.io.files import MAX_TEXT, open_regular
from bdjax.text import visible


def save(path: Path, state: Any, compress: bool = True) -> None:
    """Write a pytree of arrays to a new directory.

    Args:
      path: path that does not exist.
      state: pytree of arrays.
      compress: whether to compress the arrays.

    Raises:
      OSError: when the operating system refuses, for example because the disk is full.
    """
    context = ocp.Context()
    context.array.saving.use_compression = compress
    try:
        with context, _quiet():
            ocp.save(path.absolute(), jax.tree.map(np.asarray, state))
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    finally:
        for unfinished in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)


def load(path: Path, like: Any) -> Any:
    """Read a pytree of arrays with the structure, shapes and dtypes of `like`.

    Raises InputError when the directory is damaged or holds other arrays.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like)
    for file in path.rglob("*"):
        if file.parent.name != "d" and not file.is_dir():  # folders "d" hold the values; other files describe them
            open_regular(file, MAX_TEXT, "a description of arrays").close()
    cause = ""
    with _quiet():
        try:
            described = ocp.metadata(path.absolute()).metadata
            stored, expected = _leaves(described), _leaves(like)
            if stored != expected:  # compared first, because Orbax leaves reads unfinished when a shape is wrong
                name = min(k for k in stored.keys() | expected.keys() if stored.get(k) != expected.get(k))
                raise ValueError(f"{name} is {stored.get(name, 'missing')}, not {expected.get(name, 'there')}")
            _check_chunks(described)
            return ocp.load(path.absolute(), like)
        except Exception as error:  # Orbax and tensorstore raise a dozen kinds on damaged files
            cause = visible(str(error).splitlines()[0] if str(error) else type(error).__name__)[:300]
        gc.collect()  # asyncio logs failures of the other reads when they are collected
    raise InputError(f"{path} does not hold this model's arrays ({cause}). Is it of another model or version?")


def _check_chunks(described: Any) -> None:
    """Raise ValueError when a chunk is larger than its array, because memory is allocated by chunk."""
    for leaf in jax.tree.leaves(described):
        chunk = getattr(getattr(leaf, "storage_metadata", None), "chunk_shape", None) or ()
        if any(part > max(side, 1) for part, side in zip(chunk, leaf.shape, strict=False)):
            raise ValueError(f"a chunk of {tuple(chunk)} is larger than its array of {tuple(leaf.shape)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs of Orbax and asyncio, which report a failure before it is raised."""
    logs = {log: log.level for log in map(logging.getLogger, ("absl", "asyncio"))}
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in logs.items():
            log.setLevel(level)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the path of each array -> (shape, dtype)."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
