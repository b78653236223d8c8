"""Arrays and pictures from files: what a header claims is compared with bounds before anything of that size is made.

Nothing is unpickled. What is read needs at most `room` bytes of memory: a file may unpack to tenfold its own size, and
to 512 MiB where that is more.
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
from bdjax.io.files import open_regular, format_bytes
from bdjax.text import visible

MAX_FILE = 64 << 30
"""Bytes of a file of arrays, at most."""
MAX_PICTURE_FILE = 64 << 20
MAX_PIXELS = 4096 * 4096
"""Of one picture, at most."""
_LEAST_ROOM, _TIMES = 512 << 20, 10
_MAX_HEADER = 10_000  # bytes of what describes an array
_MAX_ENTRIES = 4096  # of an .npz file
_QUIET = threading.Lock()  # the filters of warnings belong to the process


def room(stored: int) -> int:
    """Bytes that what is stored in so many may unpack to."""
    return max(_LEAST_ROOM, _TIMES * stored)


class Npz:
    """The arrays of an open .npz file by name, each read when it is asked for."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Raises InputError when `file` is no .npz file, or its entries are too many or unpack to too much."""
        self.path = path
        size = file.seek(0, 2)
        _check_directory(path, file, size)
        try:
            self._archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError, OverflowError) as error:
            raise _damaged(path, error) from None
        self._entries = {info.filename.removesuffix(".npy"): info for info in self._archive.infolist()}
        need, most = sum(info.file_size for info in self._archive.infolist()), room(size)
        if len(self._entries) > _MAX_ENTRIES:
            raise InputError(f"{path} has {len(self._entries)} entries; an .npz file has at most {_MAX_ENTRIES}.")
        if need > most:
            raise InputError(
                f"{path} has {size} bytes and claims to unpack to {need}; at most {most} ({format_bytes(most)}) are "
                "read. If the arrays are what they should be, save them uncompressed (numpy.savez)."
            )
        self.files = list(self._entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """The array. Raises InputError when it is damaged, of another size than its header says, or a pickle."""
        info, where = self._entries[name], f"{visible(name)} of {self.path}"
        with _reading(where), self._archive.open(info) as file:
            shape, dtype = _header(file, where)
            begin = file.tell()
            _check_size(where, shape, dtype, info.file_size - begin)
        with _reading(where), self._archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)  # to the last byte, so its CRC is compared


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """The .npz file `path`. Raises InputError, one line, for anything else and for what is too large."""
    with open_regular(path, MAX_FILE, "an .npz file") as file:
        yield Npz(Path(path), file)


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file. Raises InputError when it is none, too large or a pickle."""
    with open_regular(path, MAX_FILE, "an .npy file") as file:
        size = file.seek(0, 2)
        file.seek(0)
        with _reading(str(path)):
            shape, dtype = _header(file, str(path))
            _check_size(str(path), shape, dtype, size - file.tell(), _LEAST_ROOM)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)


@contextmanager
def open_picture(path: Path, formats: tuple[str, ...], what: str) -> Iterator[Any]:
    """A picture of Pillow's whose header is read and whose pixels are not yet.

    Args: formats: Pillow's names of those that are taken (not all of them: of EPS, it starts a program); what: such a
      file, for messages.
    Raises InputError when it is no regular file, has more than MAX_PIXELS, or cannot be read in the block.
    """
    from PIL import Image

    with open_regular(path, MAX_PICTURE_FILE, "a picture") as file:
        try:
            with _QUIET, warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is a lower one
                picture = Image.open(file, formats=formats)
            with picture:
                check_pixels(path, picture.size)
                yield picture
        except InputError:
            raise
        except Image.DecompressionBombError as error:
            raise InputError(f"{path} is too large ({error}); {_PIXELS}") from None
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
            said = visible(str(error).replace(repr(file), "it")) or type(error).__name__
            raise InputError(f"{path} is not a readable {what} ({said}). Replace or remove it.") from error


_PIXELS = f"a picture has at most {MAX_PIXELS} pixels (4096 x 4096). Make it smaller."


def check_pixels(path: Path, size: tuple[int, int]) -> None:
    """Raise InputError for a picture of too many pixels."""
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"{path} has {size[0]}x{size[1]} pixels; {_PIXELS}")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on damaged files
        said = visible(str(error))[:200] or type(error).__name__
        raise InputError(f"{where} is damaged ({said}). Copy or write the file again.") from error


def _header(file: Any, where: str) -> tuple[tuple[int, ...], np.dtype]:
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


def _check_size(where: str, shape: tuple[int, ...], dtype: np.dtype, there: int, most: int | None = None) -> None:
    count = math.prod(shape)
    if count * dtype.itemsize != there or count > max(there, 1) or len(shape) > 16:
        raise InputError(
            f"{where} claims {count} elements of {dtype.itemsize} bytes and has {there} bytes: it is cut off or "
            "damaged. Copy or write the file again."
        )
    if most is not None and there > most:
        raise InputError(f"{where} has {there} bytes; at most {most} ({format_bytes(most)}) are read.")


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Refuse a list of entries that is too long, before `zipfile` makes an object of each."""
    start = file.seek(max(0, size - 22 - (1 << 16)))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise _damaged(path, "it has no end")
    length = struct.unpack("<I", tail[end + 12 : end + 16])[0]
    if length == 0xFFFFFFFF and start + end >= 76:  # the larger form keeps its numbers in a record before
        file.seek(start + end - 76)
        length = struct.unpack("<Q", file.read(56)[40:48])[0]
    if length > min(size, _MAX_ENTRIES * 256):
        raise InputError(f"{path} claims a directory of {length} bytes; {_MAX_ENTRIES} entries take less.")


def _damaged(path: Path, why: Any) -> InputError:
    return InputError(
        f"{path} is not a .npz file, or it is cut off ({visible(str(why))[:200]}). Copy it again, or write it with "
        "numpy.savez_compressed."
    )
