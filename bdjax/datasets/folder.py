"""A folder of images: `train/CLASS/...` with `test/CLASS/...`, or `CLASS/...` alone, which is then split 80/20.

The splits may be called training, testing, val, valid or validation, in upper or lower case. Images are .png, .jpg,
.bmp, .webp, .tiff, .ppm and similar files, in upper or lower case, at any depth below their class folder, including
linked folders. The `notes` of the data set state what is left out: names that begin with a dot, other files, and other
folders next to the splits.
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
_MIN_LIMIT, _SIZE_FACTOR = 512 << 20, 50  # limit of all images in memory: these bytes, or the files' size times this
Files: TypeAlias = list[tuple[Path, int]]


def load(rest: str) -> Data:
    """Load the data set in a folder; its name is the folder's.

    Classes are the names of the folders, by number where all of them are numbers, else in code-point order. The images
    of a class are in the order of their paths. Without a `train` folder of class folders, max(1, round(n / 5)) of the n
    images of a class are test images, evenly spaced: of every five images in path order the third. Images are uint8 RGB
    (alpha is dropped), rotated according to their EXIF orientation, or [N, H, W, 1] when every image of both splits is
    grayscale.

    Args:
      rest: path of the folder.

    Returns:
      The data set.

    Raises:
      InputError: when the path is not a folder, there are no classes, the splits have different classes, a class has
        no images, an image is damaged or 16-bit grayscale, a name is not UTF-8, or the images differ in size. The
        message names the file or folder.
    """
    if not rest:
        raise InputError("the data set `folder` needs a path. Write `folder:PATH`, where PATH contains class folders.")
    _checks.check_text("the path of a data set", rest)
    root = Path(rest).expanduser()
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(f"folder:{rest}: {root.absolute()} {problem}. Give a folder with {_layout.LAYOUTS}.")
    skipped = Counter[str]()
    splits = _layout.splits(root)
    if splits is not None:
        classes, train, test = _list_splits(splits.train, splits.test, skipped)
    else:
        classes, train, test = _split_classes(root, skipped)
    x, rotated = _read([path for path, _ in train + test])
    y = np.array([label for _, label in train + test], np.int32)
    n = len(train)
    notes = _layout.notes(root, splits, skipped, rotated)
    return _checks.check_data(root.resolve().name, x[:n], y[:n], x[n:], y[n:], classes, notes)


def _images(folder: Path, skipped: Counter[str]) -> list[Path]:
    """Return the images at any depth below a class folder, in path order; `skipped` counts the other files by kind."""
    images = []
    for path in _layout.files(folder):
        if any(part[0] == "." for part in path.relative_to(folder).parts):
            skipped["hidden"] += 1
        elif path.name.lower().endswith(ENDINGS):
            images.append(path)
        else:
            skipped[path.suffix.lower() or "no ending"] += 1
    if not images:
        others = f"; there are other files ({', '.join(sorted(skipped)[:5])})" if skipped else ""
        raise InputError(
            f"class folder {folder} has no image ({', '.join(USUAL)}) and none of {', '.join(ENDINGS[3:])}{others}. "
            "Remove the folder or fill it."
        )
    return sorted(images)


def _list_splits(train: Path, test: Path, skipped: Counter[str]) -> tuple[list[str], Files, Files]:
    """Return the class names, and the files of the training and the test split with their labels."""
    names = {split: [p.name for p in _layout.folders(split)] for split in (train, test)}
    for split, other in ((train, test), (test, train)):
        extra = sorted(set(names[split]) - set(names[other]))
        if extra:
            raise InputError(
                f"{split} has {len(extra)} class folder(s) that {other} lacks: {', '.join(extra[:5])}. "
                f"Both splits need the same classes."
            )
    files = [
        [(path, i) for i, name in enumerate(names[train]) for path in _images(split / name, skipped)]
        for split in (train, test)
    ]
    return names[train], files[0], files[1]


def _split_classes(root: Path, skipped: Counter[str]) -> tuple[list[str], Files, Files]:
    """Split the images of each class 80/20; return the class names, and the files of both splits with their labels."""
    folders = _layout.folders(root)
    if not folders:
        raise InputError(f"{root} has no class folders. Expected {_layout.LAYOUTS}.{_layout.conversion_hint(root)}")
    train: Files = []
    test: Files = []
    for label, folder in enumerate(folders):
        paths = _images(folder, skipped)
        if len(paths) < 2:
            raise InputError(f"class folder {folder} has 1 image; to split it into train and test it needs 2 or more.")
        for path, held_out in zip(paths, spread(len(paths), max(1, round(len(paths) / 5))), strict=True):
            (test if held_out else train).append((path, label))
    return [folder.name for folder in folders], train, test


def _read(paths: list[Path]) -> tuple[np.ndarray, int]:
    """Decode images in threads.

    Returns:
      (uint8 [N, H, W, 3] in the order of the paths, or [N, H, W, 1] when all are grayscale; number of images that were
      rotated by their EXIF orientation).
    """
    width, height = _decode(paths[0])[1].shape[1::-1]
    need, limit = (
        len(paths) * height * width * 3,
        max(_MIN_LIMIT, _SIZE_FACTOR * sum(path.stat().st_size for path in paths if path.exists())),
    )
    if need > limit:
        raise InputError(
            f"{len(paths)} images of {width}x{height} pixels, the size of {paths[0]}, would take {need} bytes; the "
            f"limit is {limit} bytes ({format_bytes(limit)}) for these files. Resize the images first."
        )
    out = np.empty((len(paths), height, width, 3), np.uint8)

    def fill(start: int) -> tuple[bool, tuple[int, str] | None, int]:
        """Decode one chunk into `out`.

        Returns:
          (whether all images are grayscale; index and size of the first image of another size, or None; number of
          rotated images).
        """
        all_gray, mismatch, rotations = True, None, 0
        for i in range(start, min(start + _CHUNK, len(paths))):
            gray, image, rotated = _decode(paths[i])
            all_gray &= gray
            rotations += rotated
            if image.shape[:2] == (height, width):
                out[i] = image
            elif mismatch is None:
                mismatch = i, f"{image.shape[1]}x{image.shape[0]}"
        return all_gray, mismatch, rotations

    gray, rotated = True, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # in order, so that the first error in path order is reported
        for chunk_gray, mismatch, rotations in pool.map(fill, range(0, len(paths), _CHUNK)):
            gray &= chunk_gray
            rotated += rotations
            if mismatch:
                raise InputError(
                    f"images differ in size (width x height): {paths[0]} is {width}x{height}, {paths[mismatch[0]]} is "
                    f"{mismatch[1]}. Resize all images to one size first, for instance with "
                    "`mogrify -resize '32x32!' *.png` in each class folder."
                )
    return (out[..., :1] if gray else out), rotated


def _decode(path: Path) -> tuple[bool, np.ndarray, bool]:
    """Decode an image.

    Returns:
      (whether it is grayscale; pixels, uint8 [H, W, 1] if so, else [H, W, 3]; whether it was rotated).
    """
    from PIL import ImageOps

    kind = "PNG or JPEG" if path.name.lower().endswith(USUAL) else path.suffix[1:].upper()
    with open_picture(path, _FORMATS, f"{kind} image") as image:
        mode, frames = image.mode, getattr(image, "n_frames", 1)
        rotated = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        if mode[0] not in "IF" and frames == 1:
            upright = ImageOps.exif_transpose(image) if rotated else image
            if mode in ("1", "L"):
                return True, np.asarray(upright.convert("L"))[..., None], rotated
            # a palette may contain transparency, which Pillow drops without a warning only if converted to RGBA first
            return False, np.asarray((upright.convert("RGBA") if mode == "P" else upright).convert("RGB")), rotated
    if frames > 1:
        raise InputError(f"{path} contains {frames} frames. Save the intended frame as a file of its own.")
    # convert() would clip these at 255 instead of scaling them
    raise InputError(
        f"{path} has 16 or more bits per pixel in one channel (mode {mode}). Convert it to 8-bit grayscale."
    )
