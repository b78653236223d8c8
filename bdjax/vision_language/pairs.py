"""Sets of images with captions, and labelled images for zero-shot classification.

| source             | pairs                                                                                         |
|--------------------|-----------------------------------------------------------------------------------------------|
| `captions:DATASET` | the training images of a data set of :mod:`bdjax.datasets`, with captions by templates        |
| `pairs:FILE`       | a table (.csv, .tsv, .parquet) with a column of pictures and one of captions, as CC3M's users |
|                    | keep it; the pictures' paths are relative to the table's folder                               |
| `pairs:FOLDER`     | pictures with their captions in text files of the same name (as img2dataset writes them)      |

Pictures of tables and folders are resized to the model's side (the shorter side, bicubic) and cropped in the middle.
"""

import csv
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax import datasets
from bdjax.errors import InputError
from bdjax.io.arrays import open_picture
from bdjax.io.files import open_regular, read_bytes
from bdjax.pair_types import LabelledImages, Pairs
from bdjax.text import visible
from bdjax.vision_language import prompts

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
_PICTURES = ("image", "image_path", "path", "filepath", "file_path", "filename", "file_name", "file")
_CAPTIONS = ("caption", "text", "title", "captions")
_MAX_TABLE, _MAX_CAPTION = 4 << 30, 1 << 20  # bytes
_CHUNK = 64  # pictures that a thread decodes at a time


class Source(NamedTuple):
    """Training pairs, and the labelled test images of the same data set where there are some."""

    pairs: Pairs
    test: LabelledImages | None
    train: LabelledImages | None


def load(spec: str, side: tuple[int, int] | None, templates: Sequence[str], seed: int = 0) -> Source:
    """Load pairs by their specification.

    Args:
      spec: "captions:DATASET" or "pairs:PATH".
      side: (H, W) to which pictures of a table or folder are resized; None: the size of the first one.
      templates: captions with {} in place of a class, for "captions:".
      seed: draws the templates.

    Returns:
      The pairs, and the labelled images that they were made of.

    Raises:
      InputError: when the source is unknown or damaged, and for an image without a caption.
    """
    kind, _, rest = spec.partition(":")
    if kind == "captions" and rest:
        return _of_labels(rest, templates, seed)
    if kind != "pairs" or not rest:
        raise InputError(
            f"unknown pairs {spec!r}. Write captions:DATASET (captions:digits, captions:npz:cifar10.npz), or "
            "pairs:PATH with a table (.csv, .tsv, .parquet) or a folder of pictures and text files."
        )
    path = Path(rest).expanduser()
    rows = _folder_rows(path) if path.is_dir() else _table_rows(path)
    if not rows:
        raise InputError(f"{path} holds no pair. Give a table with pictures and captions, or a folder of both.")
    images = read_pictures([file for file, _ in rows], side)
    return Source(Pairs(path.name, images, tuple(caption for _, caption in rows)), None, None)


def labelled(dataset: str) -> LabelledImages:
    """Return the test images of a data set, with the names of its classes."""
    data = datasets.load(dataset)
    return LabelledImages(data.x_test, data.y_test, tuple(data.classes))


def _of_labels(dataset: str, templates: Sequence[str], seed: int) -> Source:
    """Make captions of the training images of a labelled data set."""
    data = datasets.load(dataset)
    captions = prompts.random_captions(data.classes, data.y_train, templates, np.random.default_rng(seed))
    pairs = Pairs(data.name, data.x_train, captions, data.y_train, data.notes)
    train, test = (
        LabelledImages(images, labels, tuple(data.classes))
        for images, labels in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    )
    return Source(pairs, test, train)


def _folder_rows(folder: Path) -> list[tuple[Path, str]]:
    """Return (picture, caption) of a folder in the order of the paths, at any depth."""
    rows = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS):
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise InputError(f"{file} has no caption: {text.name} is missing. Add it, or remove the picture.")
        try:
            caption = read_bytes(text, _MAX_CAPTION, "a caption").decode().strip()
        except UnicodeDecodeError:
            raise InputError(f"{text} is not UTF-8 text. Convert it.") from None
        rows.append((file, _checked(caption, str(text))))
    return rows


def _table_rows(path: Path) -> list[tuple[Path, str]]:
    """Return (picture, caption) of a table."""
    with open_regular(path, _MAX_TABLE, "a table of pairs"):
        pass
    ending = path.suffix.lower()
    if ending == ".parquet":
        header, lines = _parquet(path)
    elif ending in (".csv", ".tsv"):
        header, lines = _text_table(path, "," if ending == ".csv" else "\t")
    else:
        raise InputError(f"{path} is no table of pairs: its name must end in .csv, .tsv or .parquet.")
    picture, caption = (_column(path, header, names, what) for names, what in
                        ((_PICTURES, "pictures"), (_CAPTIONS, "captions")))  # fmt: skip
    rows = []
    for number, line in enumerate(lines, 2):
        if len(line) <= max(picture, caption):
            raise InputError(f"row {number} of {path} has {len(line)} columns; its header has {len(header)}.")
        name, where = str(line[picture]).strip(), f"row {number} of {path}"
        if "://" in name:
            raise InputError(f"{where} names an address. Download the pictures first (img2dataset), then give paths.")
        rows.append((path.parent / name, _checked(line[caption], where)))
    return rows


def _text_table(path: Path, delimiter: str) -> tuple[list[str], list[list[str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, delimiter=delimiter) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no table ({visible(str(error))[:80]}). Save it as UTF-8.") from None
    return (lines[0], lines[1:]) if lines else ([], [])


def _parquet(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path} needs pyarrow: pip install pyarrow, or save the table as .csv.") from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is no Parquet table ({visible(str(error))[:80]}).") from None
    columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), [list(line) for line in zip(*columns, strict=True)]


def _column(path: Path, header: list[str], names: Sequence[str], what: str) -> int:
    """Return the number of a column by its name. Raises InputError when there is none."""
    lower = [name.strip().lower() for name in header]
    for name in names:
        if name in lower:
            return lower.index(name)
    raise InputError(
        f"{path} has no column of {what}: its first row is {visible(', '.join(header[:6]))!r}. Name one of the columns "
        f"{' or '.join(names[:3])}."
    )


def _checked(caption: str | None, where: str) -> str:
    """Return a caption. Raises InputError when it is empty."""
    text = (caption or "").strip()
    if not text:
        raise InputError(f"{where} is an image without a caption. Give it one, or remove the image.")
    return text


def read_pictures(files: Sequence[Path], side: tuple[int, int] | None) -> np.ndarray:
    """Decode pictures in threads, resize them and crop them in the middle.

    Args:
      files: paths.
      side: (H, W); None: the size of the first picture, which all must have.

    Returns:
      uint8 [N, H, W, 3].

    Raises:
      InputError: when a picture is damaged, or differs in size where `side` is None.
    """
    height, width = side or _decode(files[0], None).shape[:2]
    images = np.empty((len(files), height, width, 3), np.uint8)

    def fill(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(files))):
            image = _decode(files[index], side)
            if image.shape[:2] != (height, width):
                raise InputError(f"{files[index]} is not of {width}x{height} pixels. Give --side to resize all.")
            images[index] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(0, len(files), _CHUNK)):
            pass
    return images


def _decode(file: Path, side: tuple[int, int] | None) -> np.ndarray:
    """Decode a picture, uint8 [H, W, 3]."""
    from PIL import Image, ImageOps

    with open_picture(file, _FORMATS, "image") as picture:
        image = ImageOps.exif_transpose(picture).convert("RGB")
        if side is not None:
            image = ImageOps.fit(image, side[::-1], Image.Resampling.BICUBIC)
        return np.asarray(image)
