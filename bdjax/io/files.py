"""Files that are there whole or not at all, a lock for what several processes may make, free space, hashes.

What is read is a regular file of a bounded size, and what is written never goes through a symbolic link: a directory
from a stranger may hold links to anything, pipes that nobody writes to, and files without an end.

Where several processes train one model together, only the first of them writes, and all wait for it (`meet`).
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
"""Bytes of a record (JSON), at most."""
MAX_WEIGHTS = 16 << 30
"""Bytes of a weight file, at most: read are its description and the tensors of one network."""
_SPARE_BYTES = 1 << 20


def is_multiprocess() -> bool:
    """Whether this is one of several processes that train together. It does not make jax look for devices."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first of those that train together."""
    return not is_multiprocess() or sys.modules["jax"].process_index() == 0


def barrier(what: str) -> None:
    """Wait until all processes that train together have come to `what`."""
    if is_multiprocess():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is whole: by this process, or by all that train together."""
    return target.with_name(f".{target.name}.{'shared' if is_multiprocess() else os.getpid()}.partial")


@contextlib.contextmanager
def locked(target: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the right to make `target`; another process waits here, after calling `waiting`.

    A killed holder lets go by itself. What it had half written beside `target` is swept up by the next one. The first
    process holds it for all that train together.
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
    lock = filelock.FileLock(path, fallback_to_soft=False)  # opens no link, and empties nothing
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        waiting()
        lock.acquire()
    try:
        for left in path.parent.glob(f".{glob.escape(target.name)}.*.partial*"):
            if re.fullmatch(r"(\d+|shared)\.partial.*", left.name[len(target.name) + 2 :]):
                shutil.rmtree(left, ignore_errors=True)
        barrier("a lock is held")
        yield
    finally:
        path.unlink(missing_ok=True)  # one who waits for it sees that it has gone, and makes another
        lock.release()


def _kind(path: Path) -> str:
    mode = os.lstat(path).st_mode
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"))
    return next((name for test, name in kinds if test(mode)), "a device or a socket")


def check_not_symlink(path: Path) -> None:
    """Raise InputError when `path`, a folder whose content will be replaced, is a symbolic link to another."""
    if Path(path).is_symlink():
        raise InputError(f"{path} is a symbolic link, and what it leads to would be replaced. Remove it.")


def remove_symlink(path: Path) -> Path:
    """`path`, where a file will be written, after a symbolic link that stands there was removed."""
    if path.is_symlink():
        path.unlink()
    return path


def open_regular(path: Path, most: int, what: str) -> BufferedReader:
    """A file opened for reading, which never waits.

    Args: most: bytes that it may have; what: such a file, for the message ("a record").
    Raises InputError when there is none, when it is no regular file (a pipe, a device), and when it is larger.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a pipe, too, without a writer
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no such file: {path}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', error)}).") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(descriptor)
        if stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} has {found.st_size} bytes; {what} has at most {most} ({format_bytes(most)}).")
        sort = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, a device or a socket"
        raise InputError(f"{path} is {sort}, not a regular file. Give {what} as a file.")
    return open(descriptor, "rb")


def format_bytes(count: int) -> str:
    """A number of bytes for people: 512 MiB, 2 GiB."""
    unit, name = (1 << 30, "GiB") if count >= 1 << 30 else (1 << 20, "MiB")
    return f"{count / unit:.4g} {name}"


def read_bytes(path: Path, most: int, what: str) -> bytes:
    """All of a file. Raises InputError as :func:`open_regular`."""
    with open_regular(path, most, what) as file:
        return file.read(most + 1)  # it may grow meanwhile


def read_record(path: Path) -> Any:
    """The value of a JSON file. Raises ValueError when it is none, nests too deeply, or is refused by the above."""
    try:
        return json.loads(read_bytes(path, MAX_TEXT, "a record").decode())
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path` when all of it is on the disk; nothing but the first process's is kept."""
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
    """Raise InputError when the disk that holds `path` has less than `need` bytes (and a little) free."""
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < need + _SPARE_BYTES:
        raise InputError(
            f"no space to write {path}: {need / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free on {existing}. "
            "Free some, or choose another directory with --out; finished epochs are kept."
        )


def sha256(path: Path, most: int = MAX_WEIGHTS, what: str = "a file to be hashed") -> str:
    """Of a file, as hexadecimal digits. Raises InputError as :func:`open_regular`."""
    with open_regular(path, most, what) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
