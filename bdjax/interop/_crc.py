"""The checksums of a zip's entries, which opening it does not compare."""

import zipfile
import zlib
from pathlib import Path

from bdjax.interop._tensors import Refused, quote
from bdjax.io.files import MAX_WEIGHTS, open_regular

_PART = 1 << 20


def check(path: Path) -> None:
    """Raise Refused when an entry's bytes are not those that its CRC-32 was taken of.

    A file in which every entry's is 0 was written without (torch.serialization.set_crc32_options).
    """
    with open_regular(path, MAX_WEIGHTS, "a weight file") as file:
        if file.read(2) != b"PK":
            return
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if not any(entry.CRC for entry in entries):
                    return
                for entry in entries:
                    _compare(archive, entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            raise Refused(f"it is damaged ({quote(str(error))}). Copy or save it again") from None


def _compare(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as opened:  # its end raises BadZipFile
        while opened.read(_PART):
            pass
