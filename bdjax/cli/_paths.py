"""Output files and directories of commands: checked before computing, and removed on --force."""

import os
import shutil
from pathlib import Path

from bdjax.errors import InputError

_BDJAX_FILES = ("config.json", "result.json", "manifest.json", "victim")


def remove_run(directory: Path) -> None:
    """Delete a directory that bdjax wrote, if it exists; all processes wait until it is gone.

    Raises InputError for a file, a symbolic link and a directory of other content.
    """
    from bdjax.io import checkpoint

    if checkpoint.is_main_process():
        _remove(directory)
    checkpoint.barrier("what was there is removed")


def _remove(directory: Path) -> None:
    if not directory.exists():
        return
    if directory.is_symlink() or not directory.is_dir():
        raise InputError(f"{directory} is a file or a symbolic link, not a bdjax directory. Choose another --out.")
    ours = any((directory / name).exists() for name in _BDJAX_FILES)
    if not ours and any(directory.iterdir()):
        raise InputError(f"{directory} is not a bdjax run and was not deleted. Choose another --out.")
    shutil.rmtree(directory)


def check_output_file(path: Path, suffix: str | tuple[str, ...], kind: str) -> None:
    """Check, before any computing, that --out can be written.

    Args:
      path: value of --out.
      suffix: allowed ends of the file's name.
      kind: of file, for the message, such as "PNG".

    Raises:
      InputError: when the name has another end, or the file cannot be written.
    """
    if not path.name.lower().endswith(suffix):
        ends = suffix if isinstance(suffix, str) else " or ".join(suffix)
        raise InputError(f"--out {path} does not end in {ends}. Give the name of a {kind} file.")
    if path.is_dir():
        raise InputError(f"--out {path} is a directory. Give the name of a {kind} file.")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no directory {path.parent}. Make it, or choose another --out.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written (permission denied). Choose another --out.")
