"""Atomic writes, bounded reads, locks between processes, checks of free disk space, and file hashes.

Only regular files of bounded size are read, and symbolic links are never written through: an untrusted directory may
contain links to any file, pipes without a writer, and files of unlimited size.

When several processes train one model together (`jax.distributed`), only the main process writes and the others wait
for it (:func:`barrier`).
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from bdjax.errors import InputError

MAX_TEXT = 16 << 20
"""Largest size of a record (JSON) in bytes."""
MAX_WEIGHTS = 16 << 30
"""Largest size of a weight file in bytes; only its description and the tensors of one network are read."""
_SPARE_BYTES = 1 << 20


def is_multiprocess() -> bool:
    """Whether this is one of several processes that train together. Does not initialise jax's backends."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_main_process() -> bool:
    """Whether this process writes files: it is the only one, or the first of those that train together."""
    return not is_multiprocess() or sys.modules["jax"].process_index() == 0


def barrier(what: str) -> None:
    """Wait until all processes that train together have reached the barrier named `what`."""
    if is_multiprocess():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def partial_of(target: Path) -> Path:
    """Return the temporary path where `target` is written before it is renamed."""
    return target.with_name(f".{target.name}.{'shared' if is_multiprocess() else os.getpid()}.partial")


@contextlib.contextmanager
def locked(target: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on `target`, a file or directory to create.

    The lock of a killed process is released by the operating system, and the next holder removes its partial files.
    Among processes that train together, the main process holds the lock for all.

    Args:
      target: path to create inside the block.
      waiting: called once if another process holds the lock, before waiting for it.

    Yields:
      None.

    Raises:
      InputError: when the lock file's path is occupied by something other than a regular file.
    """
    if not is_main_process():
        barrier("a lock is held")
        yield
        return
    target = Path(os.path.abspath(target))
    path = target.with_name(f".{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise InputError(f"{path} would be the lock of {target}, but it is {_kind(path)}. Remove it.")
    lock = filelock.FileLock(path, fallback_to_soft=False)  # does not follow links or truncate files
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        waiting()
        lock.acquire()
    try:
        for partial in path.parent.glob(f".{glob.escape(target.name)}.*.partial*"):
            if re.fullmatch(r"(\d+|shared)\.partial.*", partial.name[len(target.name) + 2 :]):
                shutil.rmtree(partial, ignore_errors=True)
        barrier("a lock is held")
        yield
    finally:
        path.unlink(missing_ok=True)  # a waiting process notices the removal and creates another
        lock.release()


def _kind(path: Path) -> str:
    """Describe a path that is not a regular file, for messages."""
    mode = os.lstat(path).st_mode
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"))
    return next((name for test, name in kinds if test(mode)), "a device or a socket")


def check_not_symlink(path: Path) -> None:
    """Raise InputError when `path`, a folder whose content will be replaced, is a symbolic link."""
    if Path(path).is_symlink():
        raise InputError(f"{path} is a symbolic link, and what it leads to would be replaced. Remove it.")


def remove_symlink(path: Path) -> Path:
    """Remove `path` if it is a symbolic link, so that writing does not follow it, and return `path`."""
    if path.is_symlink():
        path.unlink()
    return path


def open_regular(path: Path, max_bytes: int, what: str) -> BufferedReader:
    """Open a regular file for reading, without blocking on pipes or devices.

    Args:
      path: path of the file.
      max_bytes: largest size that is accepted.
      what: kind of file for the message, with an article ("a record").

    Returns:
      The open file.

    Raises:
      InputError: when the file does not exist, is not a regular file (but a pipe or device), or is too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for the writer of a pipe
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no such file: {path}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', error)}).") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        os.close(descriptor)
        if stat.S_ISREG(status.st_mode):
            limit = f"{max_bytes} ({format_bytes(max_bytes)})"
            raise InputError(f"{path} has {status.st_size} bytes; {what} has at most {limit}.")
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise InputError(f"{path} is {kind}, not a regular file. Give {what} as a file.")
    return open(descriptor, "rb")


def format_bytes(count: int) -> str:
    """Format a number of bytes with a unit, such as "512 MiB" or "2 GiB"."""
    unit, name = (1 << 30, "GiB") if count >= 1 << 30 else (1 << 20, "MiB")
    return f"{count / unit:.4g} {name}"


def read_bytes(path: Path, max_bytes: int, what: str) -> bytes:
    """Read a regular file of bounded size.

    Args:
      path: path of the file.
      max_bytes: largest size that is accepted.
      what: kind of file for the message, with an article ("a record").

    Returns:
      Its content.

    Raises:
      InputError: as :func:`open_regular`.
    """
    with open_regular(path, max_bytes, what) as file:
        return file.read(max_bytes + 1)  # bounded, because the file may grow meanwhile


def read_record(path: Path) -> Any:
    """Read a JSON file. Raises ValueError when it is not JSON, is nested too deeply, or is not a regular small file."""
    try:
        return json.loads(read_bytes(path, MAX_TEXT, "a record").decode())
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that is renamed to `path` once it is on the disk; only the main process writes."""
    if not is_main_process():
        yield io.BytesIO()
        return
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_space(path: Path, need: int) -> None:
    """Raise InputError when the disk of `path` has less than `need` bytes and 1 MiB free."""
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < need + _SPARE_BYTES:
        raise InputError(
            f"no space to write {path}: {need / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free on {existing}. "
            "Free some, or choose another directory with --out; finished epochs are kept."
        )


def sha256(path: Path, max_bytes: int = MAX_WEIGHTS, what: str = "a file to be hashed") -> str:
    """Compute the SHA-256 of a file.

    Args:
      path: path of the file.
      max_bytes: largest size that is accepted.
      what: kind of file for the message, with an article.

    Returns:
      The hash as hexadecimal digits.

    Raises:
      InputError: as :func:`open_regular`.
    """
    with open_regular(path, max_bytes, what) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
