"""A folder of images: `train/CLASS/...` with `test/CLASS/...`, or `CLASS/...` alone, which is then split 80/20.

The splits may be called training, testing, val, valid or validation, in any case. Images are .png, .jpg, .bmp, .webp,
.tiff, .ppm and their kin, in any case, at any depth below their class folder, through linked folders too. What is left
out (names that begin with a dot, other files, folders beside the splits) is said in the set's `notes`.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bdjax.datasets import _checks, _layout
from bdjax.datasets._stratify import spread
from bdjax.errors import InputError
from bdjax.io.arrays import open_picture
from bdjax.io.files import format_bytes
from bdjax.types import Data

USUAL = (".png", ".jpg", ".jpeg")
ENDINGS = (*USUAL, ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".gif")
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF")
_ORIENTATION = 274  # the EXIF tag
_CHUNK = 128  # images a thread decodes at a time
_LEAST_ROOM, _TIMES = 512 << 20, 50  # bytes that all may take in memory: so many, or so many times the files' own
Files: TypeAlias = list[tuple[Path, int]]


def load(rest: str) -> Data:
    """The set in the folder `rest`, named by the folder.

    Classes are the folders' names: by their numbers where all of them are numbers, else in code-point order; images of
    a class in the order of their paths. Without a `train` folder of class folders, n images of a class give the test
    split max(1, n/5 rounded), evenly spaced: of every five images in path order the third. Images are uint8 RGB (alpha
    is dropped), turned as their EXIF orientation says, or [N, H, W, 1] when every image of both splits is grayscale.
    Raises InputError, naming the file or folder, for a path that is no folder, no classes, splits whose classes differ,
    a class without images, a broken image, 16-bit grayscale, names that are not UTF-8, and images that differ in size.
    """
    if not rest:
        raise InputError("the data set `folder` needs a path. Write `folder:PATH`, where PATH has class folders.")
    _checks.check_text("the path of a data set", rest)
    root = Path(rest).expanduser()
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(f"folder:{rest}: {root.absolute()} {found}. Give a folder with {_layout.LAYOUTS}.")
    left = Counter[str]()
    splits = _layout.splits(root)
    if splits is not None:
        classes, train, test = _published(root, splits.train, splits.test, left)
    else:
        classes, train, test = _own_split(root, left)
    x, turned = _read([path for path, _ in train + test])
    y = np.array([label for _, label in train + test], np.int32)
    n = len(train)
    notes = _layout.notes(root, splits, left, turned)
    return _checks.make(root.resolve().name, x[:n], y[:n], x[n:], y[n:], classes, notes)


def _images(folder: Path, left: Counter[str]) -> list[Path]:
    """Images at any depth below a class folder, in the order of their relative paths; `left` counts the other files."""
    found = []
    for path in _layout.files(folder):
        if any(part[0] == "." for part in path.relative_to(folder).parts):
            left["hidden"] += 1
        elif path.name.lower().endswith(ENDINGS):
            found.append(path)
        else:
            left[path.suffix.lower() or "no ending"] += 1
    if not found:
        others = f"; there are other files ({', '.join(sorted(left)[:5])})" if left else ""
        raise InputError(
            f"class folder {folder} has no image ({', '.join(USUAL)}) and none of {', '.join(ENDINGS[3:])}{others}. "
            "Remove the folder or fill it."
        )
    return sorted(found)


def _published(root: Path, train: Path, test: Path, left: Counter[str]) -> tuple[list[str], Files, Files]:
    names = {split: [p.name for p in _layout.folders(split)] for split in (train, test)}
    for split, other in ((train, test), (test, train)):
        extra = sorted(set(names[split]) - set(names[other]))
        if extra:
            raise InputError(
                f"{split} has {len(extra)} class folder(s) that {other} lacks: {', '.join(extra[:5])}. "
                f"Both splits need the same classes."
            )
    files = [
        [(path, i) for i, name in enumerate(names[train]) for path in _images(split / name, left)]
        for split in (train, test)
    ]
    return names[train], files[0], files[1]


def _own_split(root: Path, left: Counter[str]) -> tuple[list[str], Files, Files]:
    folders = _layout.folders(root)
    if not folders:
        raise InputError(f"{root} has no class folders. Expected {_layout.LAYOUTS}.{_layout.remedy(root)}")
    train: Files = []
    test: Files = []
    for label, folder in enumerate(folders):
        paths = _images(folder, left)
        if len(paths) < 2:
            raise InputError(f"class folder {folder} has 1 image; to split it into train and test it needs 2 or more.")
        for path, held_out in zip(paths, spread(len(paths), max(1, round(len(paths) / 5))), strict=True):
            (test if held_out else train).append((path, label))
    return [folder.name for folder in folders], train, test


def _read(paths: list[Path]) -> tuple[np.ndarray, int]:
    """uint8 [N, H, W, 3], or [N, H, W, 1] when all are grayscale, and how many were turned by their EXIF orientation;
    decoded in threads, placed in order."""
    width, height = _decode(paths[0])[1].shape[1::-1]
    need, most = (
        len(paths) * height * width * 3,
        max(_LEAST_ROOM, _TIMES * sum(path.stat().st_size for path in paths if path.exists())),
    )
    if need > most:
        raise InputError(
            f"{len(paths)} images of {width}x{height} pixels as {paths[0]} take {need} bytes; at most {most} "
            f"({format_bytes(most)}) are read, {_TIMES} times what the files have. Bring them to a smaller size first."
        )
    out = np.empty((len(paths), height, width, 3), np.uint8)

    def fill(start: int) -> tuple[bool, tuple[int, str] | None, int]:
        """Place one chunk. Returns whether all of it is grayscale, the first (index, size) that does not fit, and how
        many were turned."""
        all_gray, odd, turns = True, None, 0
        for i in range(start, min(start + _CHUNK, len(paths))):
            gray, image, turned = _decode(paths[i])
            all_gray &= gray
            turns += turned
            if image.shape[:2] == (height, width):
                out[i] = image
            elif odd is None:
                odd = i, f"{image.shape[1]}x{image.shape[0]}"
        return all_gray, odd, turns

    gray, turned = True, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # in order, so that the first fault in path order is the one reported
        for chunk_gray, odd, turns in pool.map(fill, range(0, len(paths), _CHUNK)):
            gray &= chunk_gray
            turned += turns
            if odd:
                raise InputError(
                    f"images differ in size (width x height): {paths[0]} is {width}x{height}, {paths[odd[0]]} is "
                    f"{odd[1]}. Bring all to one size first, for instance `mogrify -resize '32x32!' *.png` in each "
                    f"class folder."
                )
    return (out[..., :1] if gray else out), turned


def _decode(path: Path) -> tuple[bool, np.ndarray, bool]:
    """Whether the image is grayscale, its pixels, uint8 [H, W, 1] if so, else [H, W, 3], and whether it was turned."""
    from PIL import ImageOps

    kind = "PNG or JPEG" if path.name.lower().endswith(USUAL) else path.suffix[1:].upper()
    with open_picture(path, _FORMATS, f"{kind} image") as image:
        mode, frames = image.mode, getattr(image, "n_frames", 1)
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        if mode[0] not in "IF" and frames == 1:
            upright = ImageOps.exif_transpose(image) if turned else image
            if mode in ("1", "L"):
                return True, np.asarray(upright.convert("L"))[..., None], turned
            # a palette may hold transparency, which Pillow drops without a warning only by way of RGBA
            return False, np.asarray((upright.convert("RGBA") if mode == "P" else upright).convert("RGB")), turned
    if frames > 1:
        raise InputError(f"{path} has {frames} pictures in it. Save the one that is meant in a file of its own.")
    # convert() would clip these at 255 instead of scaling them
    raise InputError(f"{path} has 16 or more bits a pixel in one channel (mode {mode}). Convert it to 8-bit grayscale.")
