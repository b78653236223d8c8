"""Checkpoints between the phases: Orbax for the variables, a manifest with a hash of every file beside them.

A model directory is written under a temporary name and renamed when it is whole, so nothing half-written
ever stands under a final name:

    DIR/manifest.json    model, data set and its fingerprint, attack, recipe, versions, sha256 of every file and its own
    DIR/variables/       Orbax
    DIR/NAME.npz         arrays: the trigger, the poisoned indices and labels

Where several processes train together they call the same functions on one file system: Orbax wants all of them, the
rest is written by the first alone, and nobody goes on before it is there. This is the only importer of Orbax.
"""

import contextlib
import gc
import glob
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from bdjax.errors import InputError
from bdjax.io import records
from bdjax.io.arrays import open_npz
from bdjax.io.files import (
    MAX_TEXT,
    barrier,
    check_space,
    is_main_process,
    is_multiprocess,
    locked,
    open_regular,
    partial_of,
    read_bytes,
    check_not_symlink,
    sha256,
    format_bytes,
    atomic_file,
    write_text,
)
from bdjax.text import visible

__all__ = [
    "EpochSaver",
    "barrier",
    "check_space",
    "is_main_process",
    "locked",
    "model_directory",
    "read_arrays",
    "read_manifest",
    "read_record",
    "read_variables",
    "manifest_text",
    "sha256",
    "atomic_file",
    "write_arrays",
    "write_model",
    "write_text",
]

MANIFEST = "manifest.json"
FORMAT = 2  # 1 had no seal
MAX_BYTES = 2 << 30
"""Of a model directory, at most: half a billion parameters."""


def write_model(
    directory: Path, manifest: Mapping[str, Any], variables: Any, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> Path:
    """Write a model directory in one step.

    Args:
      directory: must not exist yet.
      manifest: JSON-able; "format" and "files" are added.
      arrays: file name (without .npz) -> named arrays.

    Raises: InputError when the disk is full or `directory` exists, OSError when it becomes full meanwhile.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory} exists already. Choose another directory.")
    barrier("a model is written")
    need = _bytes(variables) + sum(_bytes(dict(group)) for group in arrays.values())
    check_space(directory, need)
    partial = partial_of(directory)
    try:
        partial.mkdir(parents=True, exist_ok=is_multiprocess())
        barrier("its folder is there")
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights hardly compress, and trying takes as much memory again
        with context:
            _save(partial / "variables", variables)
        for name, group in arrays.items():
            write_arrays(partial / f"{name}.npz", group)
        if is_main_process():
            write_text(partial / MANIFEST, manifest_text({**manifest, "format": FORMAT, "files": _hashes(partial)}))
            os.rename(partial, directory)
        barrier("a model is there")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest. Its "seal" is the sha256 of this text with zeros in place of the seal."""
    text = json.dumps({**manifest, "seal": "0" * 64}, indent=1, sort_keys=True) + "\n"
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())


def model_directory(directory: Path, part: str = "purified") -> Path:
    """`directory` itself, or the model in that of a run: its `part`, victim or purified."""
    run = not (Path(directory) / MANIFEST).exists() and (Path(directory) / part).is_dir()
    return Path(directory) / part if run else Path(directory)


def read_record(directory: Path) -> dict[str, Any]:
    """The manifest of a model directory as :func:`read_manifest` gives it, every field looked at.

    Raises InputError for what `records.check_manifest` refuses: a manifest from a stranger runs nothing.
    """
    return records.check_manifest(read_manifest(directory), Path(directory) / MANIFEST)


def read_manifest(directory: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The manifest of a directory of ours, after every file in it was compared with its hash.

    Args: most: bytes of all its files.
    Raises InputError, naming the file, when one is missing, damaged, not listed, or not ours.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory. Give one that `bdjax train` or `bdjax run` wrote.")
    if not path.exists():
        raise InputError(f"{directory} is not a bdjax model directory: {path} is missing.")
    try:
        text = read_bytes(path, MAX_TEXT, "a manifest").decode()
        manifest = json.loads(text)
        files = {str(name): str(expected) for name, expected in manifest["files"].items()}
        version, seal = manifest["format"], manifest.get("seal")
        if version == FORMAT or seal is not None:
            seal = str(manifest["seal"])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or not ours ({type(error).__name__}: {visible(str(error))}). Restore or retrain it."
        ) from None
    if type(version) is not int or version not in (1, FORMAT):
        raise InputError(f"{path} has format {version!r}; this version of bdjax reads format {FORMAT}.")
    if seal is not None and (
        len(seal) != 64 or hashlib.sha256(text.replace(seal, "0" * 64).encode()).hexdigest() != seal
    ):
        raise InputError(f"{path} is damaged: its sha256 is not its seal. Restore it or train anew.")
    _check_files(directory, files, most)
    return manifest


def _check_files(directory: Path, files: Mapping[str, str], most: int) -> None:
    """Raise InputError unless what the manifest lists is there with its hash, and all that is read is listed."""
    room = most
    for name in files:
        file = directory / name
        if (
            not name.isprintable()
            or not name
            or name != str(Path(name))
            or Path(name).is_absolute()
            or ".." in Path(name).parts
        ):
            raise InputError(f"{directory / MANIFEST} is damaged: it lists {visible(name)!r}, which is not in it.")
        if not file.exists():
            raise InputError(f"{file} is missing, though {MANIFEST} lists it. Restore the directory or train it anew.")
        with open_regular(file, most, "a file of a model directory") as opened:
            room -= os.fstat(opened.fileno()).st_size
        if room < 0:
            raise InputError(f"{directory} holds more than {most} bytes ({format_bytes(most)}), more than any model.")
    for name, expected in files.items():
        if sha256(directory / name, most, "a file of a model directory") != expected:
            raise InputError(
                f"{directory / name} is damaged: its sha256 is not the one in {MANIFEST}. Restore it or train anew."
            )
    stored = [*directory.glob("*.npz"), *(file for file in (directory / "variables").rglob("*") if not file.is_dir())]
    if unknown := [file for file in stored if file.relative_to(directory).as_posix() not in files]:
        raise InputError(f"{min(unknown)} is not listed in {MANIFEST}: nothing tells whether it is whole. Remove it.")


def read_variables(directory: Path, like: Any) -> Any:
    """The variables of a model directory, with structure, shapes and dtypes of `like` (arrays or ShapeDtypeStructs).

    Raises InputError when they are of another model.
    """
    return _load(Path(directory) / "variables", like)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Named arrays as an .npz file, which is there whole or not at all."""
    with atomic_file(path) as file:
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]


def read_arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    """The named arrays of DIR/NAME.npz; nothing is unpickled. Raises InputError when it is damaged or too large."""
    with open_npz(Path(directory) / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


class EpochSaver:
    """Keeps the training state after each epoch in `folder`, the newest only; see `engine.fit`.

    A kill at any moment leaves the last whole epoch: a new one is renamed into place before the old one goes.
    Beside its arrays stands the sha256 of each of its files.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first epoch is saved."""
        self.folder = Path(folder)

    def save(self, epoch: int, state: Any) -> None:
        """Keep `state` as epoch-N and drop what was there before. Where that fails, what was there stays."""
        check_not_symlink(self.folder)
        check_space(self.folder, _bytes(state))
        target = self.folder / f"epoch-{epoch:06d}"
        partial = partial_of(target)
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        barrier("an epoch is saved")
        try:
            _save(partial, state)
            if is_main_process():
                write_text(partial / MANIFEST, manifest_text({"format": FORMAT, "files": _hashes(partial)}))
                shutil.rmtree(target, ignore_errors=True)
                os.rename(partial, target)
            barrier("an epoch is there")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if is_main_process():
            for old in self.folder.iterdir():
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(epochs done, state) of the newest whole epoch, or None. Raises InputError when a file of it is damaged."""
        check_not_symlink(self.folder)
        done = sorted(self.folder.glob("epoch-*")) if self.folder.is_dir() else []
        if not done:
            return None
        try:
            read_manifest(done[-1], 8 * MAX_BYTES)  # with the state of its optimizer, and of our own making
        except InputError as error:
            raise InputError(f"{error} Without {self.folder} the training begins anew.") from None
        return int(done[-1].name.removeprefix("epoch-")), _load(done[-1], like)

    def clear(self) -> None:
        """Forget everything: the training is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _save(path: Path, state: Any) -> None:
    """By Orbax, to a path that does not exist. Raises OSError for what the operating system refuses."""
    try:
        with _quiet():
            ocp.save(path.absolute(), jax.tree.map(np.asarray, state))
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    finally:
        for left in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)


def _load(path: Path, like: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    for file in path.rglob("*"):
        if file.parent.name != "d" and not file.is_dir():  # where values are; all else describes them
            open_regular(file, MAX_TEXT, "a description of arrays").close()
    cause = ""
    with _quiet():
        try:
            described = ocp.metadata(path.absolute()).metadata
            stored, wanted = _leaves(described), _leaves(like)
            if stored != wanted:  # compared first, for Orbax leaves reads unfinished when a shape is wrong
                name = min(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
                raise ValueError(f"{name} is {stored.get(name, 'missing')}, not {wanted.get(name, 'there')}")
            _check_chunks(described)
            return ocp.load(path.absolute(), like)
        except Exception as error:  # Orbax and tensorstore raise a dozen kinds on damaged files
            cause = visible(str(error).splitlines()[0] if str(error) else type(error).__name__)[:300]
        gc.collect()  # the failures of its other reads, which asyncio tells when they are forgotten
    raise InputError(f"{path} does not hold this model's arrays ({cause}). Is it of another model or version?")


def _check_chunks(described: Any) -> None:
    """Raise ValueError when a chunk, for which memory is taken as a whole, is larger than its array."""
    for leaf in jax.tree.leaves(described):
        chunk = getattr(getattr(leaf, "storage_metadata", None), "chunk_shape", None) or ()
        if any(part > max(side, 1) for part, side in zip(chunk, leaf.shape, strict=False)):
            raise ValueError(f"a chunk of {tuple(chunk)} is larger than its array of {tuple(leaf.shape)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax tells a failure in its log, once a thread, and so does asyncio, before it raises it."""
    logs = {log: log.level for log in map(logging.getLogger, ("absl", "asyncio"))}
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in logs.items():
            log.setLevel(level)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path of each array -> (shape, dtype)."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _hashes(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
