"""What comes back: the records as they are, and everything else in a few zip archives of limited size.

python -m accelerator.packing OUT KEEP
"""

import sys
import zipfile
import zlib
from pathlib import Path

FILES = 8
"""Files in the output directory at most."""
SIZE = 16 * 2**20
"""Bytes of one of them at most."""
_OVERHEAD = 512  # bytes of a member's entry in an archive, its name twice included, at most


def pack(out: Path, keep: Path, files: int = FILES, size: int = SIZE) -> list[str]:
    """Write KEEP's files, smallest first, into OUT/files-N.zip, each of them into the first archive with room.

    Packing again replaces the archives. What is in OUT already counts as files.

    Args:
      out: the output directory, which holds the records.
      keep: directory of the files to pack; it may be missing.
      files: number of files that OUT may hold in the end.
      size: largest size of one file, in bytes.

    Returns:
      Names of the files that did not fit.
    """
    for old in out.glob("files-*.zip"):
        old.unlink()
    room = files - sum(path.is_file() for path in out.iterdir())
    archives: list[tuple[Path, int]] = []
    left_out = []
    members = sorted((path for path in keep.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for path in members:
        name = path.relative_to(keep).as_posix()
        content = path.read_bytes()
        need = len(zlib.compress(content)) + 2 * len(name) + _OVERHEAD
        place = next((i for i, (_, used) in enumerate(archives) if used + need <= size - _OVERHEAD), None)
        if place is None:
            if len(archives) >= room or need > size - _OVERHEAD:
                left_out.append(name)
                continue
            archives.append((out / f"files-{len(archives)}.zip", 0))
            place = len(archives) - 1
        archive, used = archives[place]
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr(name, content)
        archives[place] = archive, used + need
    return left_out


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
