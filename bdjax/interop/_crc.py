"""Verification of the CRC-32 checksums of a zip file, which opening it does not verify."""

import zipfile
import zlib
from pathlib import Path

from bdjax.interop._tensors import Refused, quote
from bdjax.io.files import MAX_WEIGHTS, open_regular

_PART = 1 << 20


def check(path: Path) -> None:
    """Raise Refused when the bytes of an entry do not match its CRC-32.

    If all checksums are 0, the file was written without them (torch.serialization.set_crc32_options).
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
                    _verify(archive, entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            raise Refused(f"it is damaged ({quote(str(error))}). Copy or save it again") from None


def _verify(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as opened:  # raises BadZipFile at the end
        while opened.read(_PART):
            pass
