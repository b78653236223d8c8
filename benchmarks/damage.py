"""A disk that fills up and bits that flip: the parts of benchmarks/reliability.py that do it to files."""

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
    """A disk of `size` bytes, and what it is: a tmpfs, or (without the right to mount one) a limit for each file."""
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if mount and shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        try:
            yield place, "tmpfs"
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield place, "RLIMIT_FSIZE"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def full_disk(folder: Path, fills: int, dice: random.Random, mount: bool = True) -> dict[str, Any]:
    """An epoch and a model, then a second of each on a disk that is full before they are written to the end."""
    rng = np.random.default_rng(0)
    first, second = ({"w": rng.normal(size=300_000).astype(np.float32)} for _ in range(2))
    need, bad, refused = 900_000, [], Counter[str]()  # of 1.2 MB, which an epoch compresses by 7 %
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
            bad += [f"fill {fill}: {what}" for what in _harmed(disk, saver, first)]
        saver.save(2, second)
        checkpoint.write_model(disk / "second", {"kind": "test"}, second, {})
        restored = saver.restore(second)
        if restored is None or restored[0] != 2 or not np.array_equal(restored[1]["w"], second["w"]):
            bad.append("with room again the next epoch was not kept")
    return {"kind": "full disk", "disk": kind, "fills": fills, "refused": dict(refused), "bad": bad}


def _harmed(disk: Path, saver: checkpoint.EpochSaver, first: Any) -> list[str]:
    found = []
    restored = saver.restore(first)
    if restored is None or restored[0] != 1 or not np.array_equal(restored[1]["w"], first["w"]):
        found.append("the epoch before is not readable")
    checkpoint.read_manifest(disk / "first")
    if not np.array_equal(checkpoint.read_variables(disk / "first", first)["w"], first["w"]):
        found.append("the model before is not readable")
    there = {"disk": {"epochs", "first"}, "epochs": {"epoch-000001"}}
    for folder in (disk, disk / "epochs"):
        found += [f"{left.name} is left over" for left in folder.iterdir() if left.name not in there[folder.name]]
    return found


@contextlib.contextmanager
def filled(disk: Path, kind: str, free: int) -> Iterator[None]:
    """Leave `free` bytes, after the room was looked for: someone else takes it while a checkpoint is written."""
    looked = files.check_space
    checkpoint.check_space = lambda *_: None
    try:
        if kind == "tmpfs":
            with open(disk / "fill", "wb") as file:
                file.write(b"x" * max(0, shutil.disk_usage(disk).free - free))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free // 4, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        yield
    finally:
        checkpoint.check_space = looked
        (disk / "fill").unlink(missing_ok=True)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def flipped(directory: Path, read: Callable[[], Any], offsets: int, dice: random.Random) -> dict[str, Any]:
    """Turn a bit in every file of a directory, one after the other, and `read` it: what was and was not detected."""
    flips, missed, unclear = 0, [], []
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size]
    read()
    for path in paths:
        whole = path.read_bytes()
        for _ in range(offsets):
            at, bit = dice.randrange(len(whole)), dice.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            flips, where = flips + 1, f"{path.relative_to(directory)}: byte {at}, bit {bit}"
            try:
                read()
                missed.append(where)
            except InputError as error:
                if str(path) not in str(error):
                    unclear.append(f"{where}: {error}")
        path.write_bytes(whole)
    read()
    return {"files": len(paths), "flips": flips, "missed": missed, "unclear": unclear}
