"""Files that are there whole or not at all, a lock for what several processes may make, free space, hashes."""

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from bdjax.errors import InputError

_SPARE_BYTES = 1 << 20


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is whole."""
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def locked(target: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the right to make `target`; another process waits here, after calling `waiting`.

    A killed holder lets go by itself. What it had half written beside `target` is swept up by the next one.
    """
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
                    if re.fullmatch(r"\d+\.partial.*", left.name[len(target.name) + 2 :]):
                        shutil.rmtree(left, ignore_errors=True)
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
    """A file that gets the name `path` when all of it is on the disk."""
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
