"""Checkpoints between the phases: Orbax for the variables, a manifest with a hash of every file beside them.

A model directory is written under a temporary name and renamed when it is whole, so nothing half-written
ever stands under a final name:

    DIR/manifest.json    model, data set and its fingerprint, attack, recipe, versions, sha256 of every file
    DIR/variables/       Orbax
    DIR/NAME.npz         arrays: the trigger, the poisoned indices and labels

Where several processes train together they call the same functions on one file system: Orbax wants all of them, the
rest is written by the first alone, and nobody goes on before it is there. This is the only importer of Orbax.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from bdjax.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1
_SPARE_BYTES = 1 << 20


def write_model(
    directory: Path, manifest: Mapping[str, Any], variables: Any, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> Path:
    """Write a model directory in one step.

    Args:
      directory: must not exist yet.
      manifest: JSON-able; "format" and "files" are added.
      arrays: file name (without .npz) -> named arrays.

    Raises: InputError when the disk is full or `directory` exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory} exists already. Choose another directory.")
    meet("a model is written")
    need = _bytes(variables) + sum(_bytes(dict(group)) for group in arrays.values())
    check_space(directory, need)
    partial = _partial(directory)
    try:
        partial.mkdir(parents=True, exist_ok=_several())
        meet("its folder is there")
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights hardly compress, and trying takes as much memory again
        with context:
            ocp.save(partial.absolute() / "variables", jax.tree.map(np.asarray, variables))
        for name, group in arrays.items():
            write_arrays(partial / f"{name}.npz", group)
        if first():
            whole = {"format": FORMAT, **manifest, "files": _hashes(partial)}
            write_text(partial / MANIFEST, json.dumps(whole, indent=1, sort_keys=True) + "\n")
            os.rename(partial, directory)
        meet("a model is there")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def model_directory(directory: Path, part: str = "purified") -> Path:
    """`directory` itself, or the model in that of a run: its `part`, victim or purified."""
    run = not (Path(directory) / MANIFEST).exists() and (Path(directory) / part).is_dir()
    return Path(directory) / part if run else Path(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a model directory, after every file in it was compared with its hash.

    Raises InputError, naming the file, when one is missing, damaged, or not ours.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory. Give one that `bdjax train` or `bdjax run` wrote.")
    if not path.is_file():
        raise InputError(f"{directory} is not a bdjax model directory: {path} is missing.")
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"].items()
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged or not ours ({type(error).__name__}: {error}). Restore or retrain it."
        ) from None
    if version != FORMAT:
        raise InputError(f"{path} has format {version!r}; this version of bdjax reads format {FORMAT}.")
    for name, expected in files:
        file = directory / name
        if not file.is_file():
            raise InputError(f"{file} is missing, though {MANIFEST} lists it. Restore the directory or train it anew.")
        if sha256(file) != expected:
            raise InputError(f"{file} is damaged: its sha256 is not the one in {MANIFEST}. Restore it or train anew.")
    return manifest


def read_variables(directory: Path, like: Any) -> Any:
    """The variables of a model directory, with structure, shapes and dtypes of `like` (arrays or ShapeDtypeStructs).

    Raises InputError when they are of another model.
    """
    return _load(Path(directory) / "variables", like)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Named arrays as an .npz file, which is there whole or not at all."""
    with whole_file(path) as file:
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]


def read_arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    """The named arrays of DIR/NAME.npz; nothing is unpickled."""
    with np.load(Path(directory) / f"{name}.npz", allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


class EpochSaver:
    """Keeps the training state after each epoch in `folder`, the newest only; see `engine.fit`.

    A kill at any moment leaves the last whole epoch: a new one is renamed into place before the old one goes.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first epoch is saved."""
        self.folder = Path(folder)

    def save(self, epoch: int, state: Any) -> None:
        """Keep `state` as epoch-N and drop what was there before."""
        check_space(self.folder, _bytes(state))
        target = self.folder / f"epoch-{epoch:06d}"
        partial = _partial(target)
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        meet("an epoch is saved")
        ocp.save(partial.absolute(), jax.tree.map(np.asarray, state))
        if first():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            for old in self.folder.iterdir():
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        meet("an epoch is there")

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(epochs done, state) of the newest whole epoch, or None."""
        done = sorted(self.folder.glob("epoch-*")) if self.folder.is_dir() else []
        if not done:
            return None
        return int(done[-1].name.removeprefix("epoch-")), _load(done[-1], like)

    def clear(self) -> None:
        """Forget everything: the training is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the right to make `target`; another process waits here. A killed holder lets go by itself."""
    lock = Path(target).with_name(f".{Path(target).name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        if first():
            fcntl.flock(file, fcntl.LOCK_EX)
        meet("a lock is held")  # by the first, for all that train together
        yield


def first() -> bool:
    """Whether this process writes: the only one, or the first of those that train together."""
    return not _several() or jax.process_index() == 0


def meet(what: str) -> None:
    """Wait until all processes that train together have come to `what`."""
    if _several():
        multihost_utils.sync_global_devices(what)


def _several() -> bool:
    """Asked before jax has looked for devices, it must not begin to."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


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
    partial = _partial(path)
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


def _load(path: Path, like: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    try:
        stored, wanted = _leaves(ocp.metadata(path.absolute()).metadata), _leaves(like)
        if stored != wanted:  # compared first, for Orbax leaves reads unfinished when a shape is wrong
            name = min(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
            raise ValueError(f"{name} is {stored.get(name, 'missing')}, not {wanted.get(name, 'there')}")
        return ocp.load(path.absolute(), like)
    except (ValueError, KeyError, FileNotFoundError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} does not hold this model's arrays ({first}). Is it of another model or version?"
        ) from None


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path of each array -> (shape, dtype)."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _partial(target: Path) -> Path:
    owner = "shared" if _several() else os.getpid()
    return target.with_name(f".{target.name}.{owner}.partial")


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
