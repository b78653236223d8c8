"""A folder of images: `train/CLASS/...` with `test/CLASS/...`, or `CLASS/...` alone, which is then split 80/20.

Images are .png, .jpg or .jpeg in any case, at any depth below their class folder. Names that begin with a dot are
left out.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bdjax.arrays import open_picture
from bdjax.datasets import _checks
from bdjax.datasets._spread import spread
from bdjax.errors import InputError
from bdjax.files import shown_size
from bdjax.types import Data

ENDINGS = (".png", ".jpg", ".jpeg")
TRAIN, TEST = "train", "test"
_LAYOUTS = "PATH/train/CLASS/*.png with PATH/test/CLASS/*.png, or PATH/CLASS/*.png (also .jpg and .jpeg)"
_CHUNK = 128  # images a thread decodes at a time
_LEAST_ROOM, _TIMES = 512 << 20, 50  # bytes that all may take in memory: so many, or so many times the files' own
Files: TypeAlias = list[tuple[Path, int]]


def load(rest: str) -> Data:
    """The set in the folder `rest`, named by the folder.

    Classes are the folders' names in code-point order, images of a class in the order of their paths. Without a
    `train` folder of class folders, n images of a class give the test split max(1, n/5 rounded), evenly spaced: of
    every five images in path order the third. Images are uint8 RGB (alpha is dropped), or [N, H, W, 1] when every
    image of both splits is grayscale. Raises InputError, naming the file or folder, for a path that is no folder, no
    classes, splits whose classes differ, a class without images, a broken image, 16-bit grayscale, and images that
    differ in size.
    """
    if not rest:
        raise InputError("the data set `folder` needs a path. Write `folder:PATH`, where PATH has class folders.")
    root = Path(rest).expanduser()
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(f"folder:{rest}: {root.absolute()} {found}. Give a folder with {_LAYOUTS}.")
    if _folders(root / TRAIN):
        classes, train, test = _published(root)
    else:
        classes, train, test = _own_split(root)
    x = _read([path for path, _ in train + test])
    y = np.array([label for _, label in train + test], np.int32)
    n = len(train)
    return _checks.make(root.resolve().name, x[:n], y[:n], x[n:], y[n:], classes)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".") if path.is_dir() else []


def _images(folder: Path) -> list[Path]:
    """Images at any depth below a class folder, in the order of their relative paths."""
    walk = os.walk(folder)  # does not follow linked folders, so it ends
    found = [Path(at, name) for at, _, names in walk for name in names if name.lower().endswith(ENDINGS)]
    found = sorted(path for path in found if not any(p[0] == "." for p in path.relative_to(folder).parts))
    if not found:
        raise InputError(f"class folder {folder} has no image ({', '.join(ENDINGS)}). Remove the folder or fill it.")
    return found


def _published(root: Path) -> tuple[list[str], Files, Files]:
    names = {split: [p.name for p in _folders(root / split)] for split in (TRAIN, TEST)}
    if not names[TEST]:
        raise InputError(
            f"{root} has {TRAIN}/ with class folders, but no such {TEST}/. Add {TEST}/CLASS/, or rename the "
            f"validation folder, or move the class folders up into {root}: the set is then split 80/20."
        )
    for split, other in ((TRAIN, TEST), (TEST, TRAIN)):
        extra = sorted(set(names[split]) - set(names[other]))
        if extra:
            raise InputError(
                f"{root / split} has {len(extra)} class folder(s) that {root / other} lacks: {', '.join(extra[:5])}. "
                f"Both splits need the same classes."
            )
    train, test = (
        [(path, i) for i, name in enumerate(names[TRAIN]) for path in _images(root / split / name)]
        for split in (TRAIN, TEST)
    )
    return names[TRAIN], train, test


def _own_split(root: Path) -> tuple[list[str], Files, Files]:
    folders = _folders(root)
    if not folders:
        raise InputError(f"{root} has no class folders. Expected {_LAYOUTS}.")
    train: Files = []
    test: Files = []
    for label, folder in enumerate(folders):
        paths = _images(folder)
        if len(paths) < 2:
            raise InputError(f"class folder {folder} has 1 image; to split it into train and test it needs 2 or more.")
        for path, held_out in zip(paths, spread(len(paths), max(1, round(len(paths) / 5))), strict=True):
            (test if held_out else train).append((path, label))
    return [folder.name for folder in folders], train, test


def _read(paths: list[Path]) -> np.ndarray:
    """uint8 [N, H, W, 3], or [N, H, W, 1] when all are grayscale; decoded in threads, placed in order."""
    width, height = _decode(paths[0])[1].shape[1::-1]
    need, most = (
        len(paths) * height * width * 3,
        max(_LEAST_ROOM, _TIMES * sum(os.stat(path).st_size for path in paths)),
    )
    if need > most:
        raise InputError(
            f"{len(paths)} images of {width}x{height} pixels as {paths[0]} take {need} bytes; at most {most} "
            f"({shown_size(most)}) are read, {_TIMES} times what the files have. Bring them to a smaller size first."
        )
    out = np.empty((len(paths), height, width, 3), np.uint8)

    def fill(start: int) -> tuple[bool, tuple[int, str] | None]:
        """Place one chunk. Returns whether all of it is grayscale, and the first (index, size) that does not fit."""
        all_gray, odd = True, None
        for i in range(start, min(start + _CHUNK, len(paths))):
            gray, image = _decode(paths[i])
            all_gray &= gray
            if image.shape[:2] == (height, width):
                out[i] = image
            elif odd is None:
                odd = i, f"{image.shape[1]}x{image.shape[0]}"
        return all_gray, odd

    gray = True
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # in order, so that the first fault in path order is the one reported
        for chunk_gray, odd in pool.map(fill, range(0, len(paths), _CHUNK)):
            gray &= chunk_gray
            if odd:
                raise InputError(
                    f"images differ in size (width x height): {paths[0]} is {width}x{height}, {paths[odd[0]]} is "
                    f"{odd[1]}. Bring all to one size first, for instance `mogrify -resize '32x32!' *.png` in each "
                    f"class folder."
                )
    return out[..., :1] if gray else out


def _decode(path: Path) -> tuple[bool, np.ndarray]:
    """Whether the image is grayscale, and its pixels: uint8 [H, W, 1] if so, else [H, W, 3]."""
    with open_picture(path, ("PNG", "JPEG"), "PNG or JPEG image") as image:
        mode = image.mode
        if mode in ("1", "L"):
            return True, np.asarray(image.convert("L"))[..., None]
        if mode[0] not in "IF":
            # a palette may hold transparency, which Pillow drops without a warning only by way of RGBA
            return False, np.asarray((image.convert("RGBA") if mode == "P" else image).convert("RGB"))
    # convert() would clip these at 255 instead of scaling them
    raise InputError(f"{path} has 16 or more bits a pixel in one channel (mode {mode}). Convert it to 8-bit grayscale.")
