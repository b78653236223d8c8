"""Files that are there whole or not at all, a lock for what several processes may make, free space, hashes.

Where several processes train one model together, only the first of them writes, and all wait for it (`meet`).
"""

import contextlib
import fcntl
import glob
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bdjax.errors import InputError

_SPARE_BYTES = 1 << 20


def several() -> bool:
    """Whether this is one of several processes that train together. It does not make jax look for devices."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process writes: the only one, or the first of those that train together."""
    return not several() or sys.modules["jax"].process_index() == 0


def meet(what: str) -> None:
    """Wait until all processes that train together have come to `what`."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is whole: by this process, or by all that train together."""
    return target.with_name(f".{target.name}.{'shared' if several() else os.getpid()}.partial")


@contextlib.contextmanager
def locked(target: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the right to make `target`; another process waits here, after calling `waiting`.

    A killed holder lets go by itself. What it had half written beside `target` is swept up by the next one. The first
    process holds it for all that train together.
    """
    if not first():
        meet("a lock is held")
        yield
        return
    target = Path(os.path.abspath(target))
    lock = target.with_name(f".{target.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(lock, file.fileno()):  # the holder before removed it: what is held is a file without name
                continue
            try:
                for left in lock.parent.glob(f".{glob.escape(target.name)}.*.partial*"):
                    if re.fullmatch(r"(\d+|shared)\.partial.*", left.name[len(target.name) + 2 :]):
                        shutil.rmtree(left, ignore_errors=True)
                meet("a lock is held")
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path` when all of it is on the disk; nothing but the first process's is kept."""
    if not first():
        yield io.BytesIO()
        return
    partial = partial_of(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_space(path: Path, need: int) -> None:
    """Raise InputError when the disk that holds `path` has less than `need` bytes (and a little) free."""
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < need + _SPARE_BYTES:
        raise InputError(
            f"no space to write {path}: {need / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free on {existing}. "
            "Free some, or choose another directory with --out; finished epochs are kept."
        )


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
