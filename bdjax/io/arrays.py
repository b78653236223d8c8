"""Read arrays and pictures from untrusted files; sizes in headers are checked before memory is allocated.

Nothing is unpickled. Reading needs at most :func:`unpacked_limit` bytes of memory: a file may unpack to ten times its
size, or to 512 MiB if that is more.
"""

import math
import struct
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bdjax.errors import InputError
from bdjax.io.files import format_bytes, open_regular
from bdjax.text import visible

MAX_FILE = 64 << 30
"""Largest size of a file of arrays in bytes."""
MAX_PICTURE_FILE = 64 << 20
MAX_PIXELS = 4096 * 4096
"""Largest number of pixels of a picture."""
_MIN_LIMIT, _MAX_RATIO = 512 << 20, 10
_MAX_HEADER = 10_000  # bytes of an .npy header
_MAX_ENTRIES = 4096  # arrays in an .npz file
_WARNINGS_LOCK = threading.Lock()  # warning filters are global to the process


def unpacked_limit(stored: int) -> int:
    """Return the largest number of bytes that a file of `stored` bytes may unpack to."""
    return max(_MIN_LIMIT, _MAX_RATIO * stored)


class Npz:
    """Arrays of an open .npz file by name, each read on access."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the directory of the file; raise InputError when it is invalid or has too many or too large entries."""
        self.path = path
        size = file.seek(0, 2)
        _check_directory(path, file, size)
        try:
            self._archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError, OverflowError) as error:
            raise _damaged(path, error) from None
        self._entries = {info.filename.removesuffix(".npy"): info for info in self._archive.infolist()}
        unpacked, limit = sum(info.file_size for info in self._archive.infolist()), unpacked_limit(size)
        if len(self._entries) > _MAX_ENTRIES:
            raise InputError(f"{path} has {len(self._entries)} entries; an .npz file has at most {_MAX_ENTRIES}.")
        if unpacked > limit:
            raise InputError(
                f"{path} has {size} bytes and claims to unpack to {unpacked}; at most {limit} ({format_bytes(limit)}) "
                "are read. If the arrays are correct, save them uncompressed (numpy.savez)."
            )
        self.files = list(self._entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read an array. Raises InputError when it is damaged, contradicts its header, or is a pickle."""
        info, where = self._entries[name], f"{visible(name)} of {self.path}"
        with _reading_array(where), self._archive.open(info) as file:
            shape, dtype = _header(file, where)
            begin = file.tell()
            _check_size(where, shape, dtype, info.file_size - begin)
        with _reading_array(where), self._archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)  # reads to the end, so the CRC is verified


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """Open an .npz file. Raises InputError when the file is invalid or too large."""
    with open_regular(path, MAX_FILE, "an .npz file") as file:
        yield Npz(Path(path), file)


def read_npy(path: Path) -> np.ndarray:
    """Read an .npy file. Raises InputError when it is invalid, too large, or a pickle."""
    with open_regular(path, MAX_FILE, "an .npy file") as file:
        size = file.seek(0, 2)
        file.seek(0)
        with _reading_array(str(path)):
            shape, dtype = _header(file, str(path))
            _check_size(str(path), shape, dtype, size - file.tell(), _MIN_LIMIT)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)


@contextmanager
def open_picture(path: Path, formats: tuple[str, ...], what: str) -> Iterator[Any]:
    """Open a picture with Pillow, with its header read and its pixels not yet decoded.

    Args:
      path: path of the file.
      formats: Pillow's names of the accepted formats; not all of Pillow's are safe (for EPS it starts a program).
      what: kind of file for messages.

    Yields:
      The Pillow image.

    Raises:
      InputError: when it is not a regular file, has more than MAX_PIXELS pixels, or cannot be decoded in the block.
    """
    from PIL import Image

    with open_regular(path, MAX_PICTURE_FILE, "a picture") as file:
        try:
            with _WARNINGS_LOCK, warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
                picture = Image.open(file, formats=formats)
            with picture:
                check_pixels(path, picture.size)
                yield picture
        except InputError:
            raise
        except Image.DecompressionBombError as error:
            raise InputError(f"{path} is too large ({error}); {_PIXELS}") from None
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
            reason = visible(str(error).replace(repr(file), "it")) or type(error).__name__
            raise InputError(f"{path} is not a readable {what} ({reason}). Replace or remove it.") from error


_PIXELS = f"a picture has at most {MAX_PIXELS} pixels (4096 x 4096). Make it smaller."


def check_pixels(path: Path, size: tuple[int, int]) -> None:
    """Raise InputError when a picture of `size` (width, height) has too many pixels."""
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"{path} has {size[0]}x{size[1]} pixels; {_PIXELS}")


@contextmanager
def _reading_array(where: str) -> Iterator[None]:
    """Turn exceptions of numpy and zipfile in the block into an InputError that names the array."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on damaged files
        reason = visible(str(error))[:200] or type(error).__name__
        raise InputError(f"{where} is damaged ({reason}). Copy or write the file again.") from error


def _header(file: Any, where: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and dtype from an .npy header of bounded length; refuse object arrays."""
    begin = file.tell()
    version = np.lib.format.read_magic(file)
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"an .npy header of {length} bytes; one has at most {_MAX_HEADER}")
    file.seek(begin)
    np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an .npy header of version {version}")
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise InputError(
            f"{where} is an object array, stored as a pickle, and pickles are never loaded (allow_pickle is False). "
            "Save it as a plain array: uint8 images of one size, integer labels, classes as strings."
        )
    return shape, dtype


def _check_size(where: str, shape: tuple[int, ...], dtype: np.dtype, size: int, limit: int | None = None) -> None:
    """Raise InputError unless the header's shape and dtype match the `size` of the data, at most `limit` bytes."""
    count = math.prod(shape)
    if count * dtype.itemsize != size or count > max(size, 1) or len(shape) > 16:
        raise InputError(
            f"{where} claims {count} elements of {dtype.itemsize} bytes and has {size} bytes: it is cut off or "
            "damaged. Copy or write the file again."
        )
    if limit is not None and size > limit:
        raise InputError(f"{where} has {size} bytes; at most {limit} ({format_bytes(limit)}) are read.")


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Refuse a zip directory that is too long, before `zipfile` creates an object for each entry."""
    start = file.seek(max(0, size - 22 - (1 << 16)))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise _damaged(path, "it has no end")
    length = struct.unpack("<I", tail[end + 12 : end + 16])[0]
    if length == 0xFFFFFFFF and start + end >= 76:  # zip64 keeps its sizes in a preceding record
        file.seek(start + end - 76)
        length = struct.unpack("<Q", file.read(56)[40:48])[0]
    if length > min(size, _MAX_ENTRIES * 256):
        raise InputError(f"{path} claims a directory of {length} bytes; {_MAX_ENTRIES} entries take less.")


def _damaged(path: Path, reason: Any) -> InputError:
    return InputError(
        f"{path} is not a .npz file, or it is cut off ({visible(str(reason))[:200]}). Copy it again, or write it with "
        "numpy.savez_compressed."
    )
