"""Model directories and training checkpoints: Orbax for the variables, a manifest with the hash of every file.

A model directory is written under a temporary name and renamed when it is complete, so a final name never refers to a
partial directory:

    DIR/manifest.json    model, data set and its fingerprint, attack, recipe, versions, SHA-256 of all files
    DIR/variables/       Orbax
    DIR/NAME.npz         arrays: the trigger, the poisoned indices and labels

Processes that train together call the same functions on a shared file system: all of them take part in Orbax's writes,
the main process writes the other files, and all wait until these exist.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax.errors import InputError
from bdjax.io import _orbax, records
from bdjax.io.arrays import open_npz
from bdjax.io.files import (
    MAX_TEXT,
    atomic_file,
    barrier,
    check_not_symlink,
    check_space,
    format_bytes,
    is_main_process,
    is_multiprocess,
    locked,
    open_regular,
    partial_of,
    read_bytes,
    sha256,
    write_text,
)
from bdjax.text import visible

__all__ = [
    "EpochSaver",
    "atomic_file",
    "barrier",
    "check_space",
    "is_main_process",
    "locked",
    "manifest_text",
    "model_directory",
    "read_arrays",
    "read_manifest",
    "read_record",
    "read_variables",
    "sha256",
    "write_arrays",
    "write_model",
    "write_text",
]

MANIFEST = "manifest.json"
FORMAT = 2  # format 1 had no seal
MAX_BYTES = 2 << 30
"""Largest size of a model directory in bytes: half a billion parameters."""


def write_model(
    directory: Path, manifest: Mapping[str, Any], variables: Any, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> Path:
    """Write a model directory atomically.

    Args:
      directory: path of the new directory; it must not exist.
      manifest: JSON values; "format", "files" and "seal" are added.
      variables: the model's variables.
      arrays: file name (without .npz) -> named arrays.

    Returns:
      The path of the directory.

    Raises:
      InputError: when `directory` exists or the disk has too little space.
      OSError: when the disk becomes full while writing.
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
        _orbax.save(partial / "variables", variables, compress=False)  # weights hardly compress; trying doubles memory
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
    """Serialise a manifest. Its "seal" is the SHA-256 of this text with zeros in place of the seal."""
    text = json.dumps({**manifest, "seal": "0" * 64}, indent=1, sort_keys=True) + "\n"
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())


def model_directory(directory: Path, part: str = "purified") -> Path:
    """Return the model directory: `directory` itself, or in a run's directory its `part` (victim or purified)."""
    run = not (Path(directory) / MANIFEST).exists() and (Path(directory) / part).is_dir()
    return Path(directory) / part if run else Path(directory)


def read_record(directory: Path) -> dict[str, Any]:
    """Read the manifest of a model directory like :func:`read_manifest`, and validate every field.

    An untrusted manifest cannot cause code to run. Raises InputError when `records.check_manifest` rejects it.
    """
    return records.check_manifest(read_manifest(directory), Path(directory) / MANIFEST)


def read_manifest(directory: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read the manifest of a directory written by this module, and verify the hash of every file.

    Args:
      directory: a model directory, or the directory of a saved epoch.
      max_bytes: largest total size of its files.

    Returns:
      The manifest.

    Raises:
      InputError: naming the file, when a file is missing, damaged, unlisted, or not written by bdjax.
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
            f"{path} is damaged or not written by bdjax ({type(error).__name__}: {visible(str(error))}). "
            "Restore or retrain it."
        ) from None
    if type(version) is not int or version not in (1, FORMAT):
        raise InputError(f"{path} has format {version!r}; this version of bdjax reads format {FORMAT}.")
    if seal is not None and (
        len(seal) != 64 or hashlib.sha256(text.replace(seal, "0" * 64).encode()).hexdigest() != seal
    ):
        raise InputError(f"{path} is damaged: its sha256 is not its seal. Restore it or train anew.")
    _check_files(directory, files, max_bytes)
    checked: dict[str, Any] = manifest
    return checked


def _check_files(directory: Path, files: Mapping[str, str], max_bytes: int) -> None:
    """Raise InputError unless every listed file has its hash and every file that may be read is listed."""
    remaining = max_bytes
    for name in files:
        file = directory / name
        if (
            not name.isprintable()
            or not name
            or name != str(Path(name))
            or Path(name).is_absolute()
            or ".." in Path(name).parts
        ):
            raise InputError(
                f"{directory / MANIFEST} is damaged: it lists {visible(name)!r}, which is not a file in it."
            )
        if not file.exists():
            raise InputError(f"{file} is missing, though {MANIFEST} lists it. Restore the directory or train it anew.")
        with open_regular(file, max_bytes, "a file of a model directory") as opened:
            remaining -= os.fstat(opened.fileno()).st_size
        if remaining < 0:
            limit = f"{max_bytes} bytes ({format_bytes(max_bytes)})"
            raise InputError(f"{directory} holds more than {limit}, more than any model.")
    for name, expected in files.items():
        if sha256(directory / name, max_bytes, "a file of a model directory") != expected:
            raise InputError(
                f"{directory / name} is damaged: its sha256 is not the one in {MANIFEST}. Restore it or train anew."
            )
    stored = [*directory.glob("*.npz"), *(file for file in (directory / "variables").rglob("*") if not file.is_dir())]
    if unknown := [file for file in stored if file.relative_to(directory).as_posix() not in files]:
        raise InputError(f"{min(unknown)} is not listed in {MANIFEST}, so it cannot be verified. Remove it.")


def read_variables(directory: Path, like: Any) -> Any:
    """Read the variables of a model directory, with the structure, shapes and dtypes of `like`.

    `like` is a pytree of arrays or ShapeDtypeStructs. Raises InputError when the variables belong to another model.
    """
    return _orbax.load(Path(directory) / "variables", like)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays atomically to an .npz file."""
    with atomic_file(path) as file:
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]


def read_arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    """Read the named arrays of DIR/NAME.npz without unpickling. Raises InputError when it is damaged or too large."""
    with open_npz(Path(directory) / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


class EpochSaver:
    """Saves the training state after each epoch to a folder, keeping only the newest (see `engine.fit`).

    If the process is killed, the last complete epoch remains: a new one is renamed into place before the old one is
    deleted. Each epoch has a manifest with the SHA-256 of its files.
    """

    def __init__(self, folder: Path) -> None:
        """Set the folder, which is created when the first epoch is saved."""
        self.folder = Path(folder)

    def save(self, epoch: int, state: Any) -> None:
        """Save `state` as epoch-N and delete older epochs; on failure the older epochs remain."""
        check_not_symlink(self.folder)
        check_space(self.folder, _bytes(state))
        target = self.folder / f"epoch-{epoch:06d}"
        partial = partial_of(target)
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        barrier("an epoch is saved")
        try:
            _orbax.save(partial, state)
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
        """Return (finished epochs, state) of the newest epoch, or None. Raises InputError when it is damaged."""
        check_not_symlink(self.folder)
        epochs = sorted(self.folder.glob("epoch-*")) if self.folder.is_dir() else []
        if not epochs:
            return None
        try:
            read_manifest(epochs[-1], 8 * MAX_BYTES)  # larger than a model, for it includes the optimizer's state
        except InputError as error:
            raise InputError(f"{error} Remove {self.folder} to start the training again.") from None
        return int(epochs[-1].name.removeprefix("epoch-")), _orbax.load(epochs[-1], like)

    def clear(self) -> None:
        """Delete all saved epochs after the training has finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _bytes(tree: Any) -> int:
    """Number of bytes of all arrays."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder by its relative path."""
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
