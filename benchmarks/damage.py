"""Full disks and flipped bits: the parts of benchmarks/reliability.py that damage files."""

import contextlib
import random
import resource
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.io import checkpoint, files


@contextlib.contextmanager
def small_disk(folder: Path, size: int, mount: bool) -> Iterator[tuple[Path, str]]:
    """Yield a disk of `size` bytes and its kind: a tmpfs, or without permission to mount one, a file-size limit."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if mount and shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        try:
            yield disk, "tmpfs"
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield disk, "RLIMIT_FSIZE"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def full_disk(folder: Path, fills: int, dice: random.Random, mount: bool = True) -> dict[str, Any]:
    """Write an epoch and a model, then write others on a disk that becomes full, and check that the first remain."""
    rng = np.random.default_rng(0)
    first, second = ({"w": rng.normal(size=300_000).astype(np.float32)} for _ in range(2))
    need, bad, refused = 900_000, [], Counter[str]()  # a file has 1.2 MB, which an epoch compresses by 7 %
    with small_disk(folder, 8 << 20, mount) as (disk, kind):
        saver = checkpoint.EpochSaver(disk / "epochs")
        saver.save(1, first)
        checkpoint.write_model(disk / "first", {"kind": "test"}, first, {"trigger": first})
        for fill in range(fills):
            with filled(disk, kind, dice.randrange(4096, need)):
                for name, write in (
                    ("epoch", lambda: saver.save(2, second)),
                    ("model", lambda: checkpoint.write_model(disk / "second", {"kind": "test"}, second, {})),
                    ("arrays", lambda: checkpoint.write_arrays(disk / "first" / "more.npz", second)),
                ):
                    try:
                        write()
                        bad.append(f"fill {fill}: the {name} was written to a full disk")
                    except (OSError, InputError) as error:
                        refused[f"{name}: {getattr(error, 'strerror', None) or type(error).__name__}"] += 1
            bad += [f"fill {fill}: {problem}" for problem in _problems(disk, saver, first)]
        saver.save(2, second)
        checkpoint.write_model(disk / "second", {"kind": "test"}, second, {})
        restored = saver.restore(second)
        if restored is None or restored[0] != 2 or not np.array_equal(restored[1]["w"], second["w"]):
            bad.append("with room again the next epoch was not kept")
    return {"kind": "full disk", "disk": kind, "fills": fills, "refused": dict(refused), "bad": bad}


def _problems(disk: Path, saver: checkpoint.EpochSaver, first: Any) -> list[str]:
    """Return what is wrong with the first epoch and model, and which partial files remain."""
    problems = []
    restored = saver.restore(first)
    if restored is None or restored[0] != 1 or not np.array_equal(restored[1]["w"], first["w"]):
        problems.append("the epoch before is not readable")
    checkpoint.read_manifest(disk / "first")
    if not np.array_equal(checkpoint.read_variables(disk / "first", first)["w"], first["w"]):
        problems.append("the model before is not readable")
    expected = {"disk": {"epochs", "first"}, "epochs": {"epoch-000001"}}
    for folder in (disk, disk / "epochs"):
        problems += [f"{path.name} is left over" for path in folder.iterdir() if path.name not in expected[folder.name]]
    return problems


@contextlib.contextmanager
def filled(disk: Path, kind: str, free: int) -> Iterator[None]:
    """Fill the disk up to `free` bytes, without the check for free space, as if another process had filled it."""
    check_space = files.check_space
    checkpoint.check_space = lambda *_: None
    try:
        if kind == "tmpfs":
            with open(disk / "fill", "wb") as file:
                file.write(b"x" * max(0, shutil.disk_usage(disk).free - free))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free // 4, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        yield
    finally:
        checkpoint.check_space = check_space
        (disk / "fill").unlink(missing_ok=True)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def flipped(directory: Path, read: Callable[[], Any], offsets: int, dice: random.Random) -> dict[str, Any]:
    """Flip single bits in every file of a directory and report which are not detected by `read`."""
    flips, missed, unclear = 0, [], []
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size]
    read()
    for path in paths:
        content = path.read_bytes()
        for _ in range(offsets):
            offset, bit = dice.randrange(len(content)), dice.randrange(8)
            path.write_bytes(content[:offset] + bytes([content[offset] ^ (1 << bit)]) + content[offset + 1 :])
            flips, where = flips + 1, f"{path.relative_to(directory)}: byte {offset}, bit {bit}"
            try:
                read()
                missed.append(where)
            except InputError as error:
                if str(path) not in str(error):
                    unclear.append(f"{where}: {error}")
        path.write_bytes(content)
    read()
    return {"files": len(paths), "flips": flips, "missed": missed, "unclear": unclear}
