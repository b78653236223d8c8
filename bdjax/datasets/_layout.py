"""The layout of a folder of images: which folders are splits, which are classes, and which are neither."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bdjax.datasets import _checks
from bdjax.errors import InputError

LAYOUTS = "PATH/train/CLASS/*.png with PATH/test/CLASS/*.png, or PATH/CLASS/*.png (also .jpg and .jpeg)"
TRAIN, TEST = "train", "test"
_TRAINING = (TRAIN, "training", "trainset", "train_set", "trainingset", "trn")
_TESTING = (TEST, "testing", "tests", "testset", "test_set")
_VALIDATION = ("val", "valid", "validation", "eval", "evaluation", "dev", "holdout")
_ANNOTATIONS = ("meta", "metadata", "annotations", "labels")  # folders that published sets have next to their splits
_MOST_FILES = 20_000_000  # bounds the search in folders with circular links


class Splits(NamedTuple):
    """The folders of the two splits, and the names of the other folders."""

    train: Path
    test: Path
    others: list[str]


_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "__pycache__")


def folders(path: Path) -> list[Path]:
    """Return the folders in a folder, without hidden ones and those that operating systems create.

    Args:
      path: the folder.

    Returns:
      The folders, by number where all names are numbers, else in code-point order.

    Raises:
      InputError: when a name is not UTF-8.
    """
    if not path.is_dir():
        return []
    children = [p for p in path.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in _SYSTEM_FOLDERS]
    for child in children:
        _checks.check_text(f"a folder in {ascii(str(path))[1:-1]}", child.name)
    if all(child.name.isascii() and child.name.isdigit() for child in children):
        return sorted(children, key=lambda child: (int(child.name), child.name))
    return sorted(children)


def files(folder: Path) -> Iterator[Path]:
    """Yield the files at any depth below a folder, following links and entering every folder once."""
    visited, count = set(), 0
    for at, below, names in os.walk(folder, followlinks=True):
        status = os.stat(at)
        if (status.st_dev, status.st_ino) in visited:
            below.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        for name in names:
            count += 1
            if count > _MOST_FILES:
                raise InputError(f"{folder} has more than {_MOST_FILES} files. Give a smaller folder.")
            yield Path(at, name)


def splits(root: Path) -> Splits | None:
    """Find the two splits in a folder.

    Args:
      root: the folder of the data set.

    Returns:
      The splits, or None where the folders in `root` are the classes.

    Raises:
      InputError: when some folders are named like splits, but the training or the test split cannot be determined.
    """
    children = folders(root)
    by_kind = {
        kind: [child for child in children if child.name.lower() in names]
        for kind, names in (("train", _TRAINING), ("test", _TESTING), ("val", _VALIDATION), ("other", _ANNOTATIONS))
    }
    with_classes = {kind: [child for child in named if folders(child)] for kind, named in by_kind.items()}
    for candidates in with_classes.values():
        if len(candidates) > 1:
            names = " and ".join(f"{child.name}/" for child in candidates)
            raise InputError(f"{root} has {names}, which look like the same split. Move all but one of them elsewhere.")
    if with_classes["train"]:
        train = with_classes["train"][0]
        test = next(iter(with_classes["test"] or with_classes["val"]), None)
        if test is None:
            flat = [child.name for child in by_kind["test"] + by_kind["val"]]
            hint = f" ({', '.join(flat)}/ has no class folders in it: sort its images into them)" if flat else ""
            raise InputError(
                f"{root} has {train.name}/ with class folders, but no {TEST}/ with class folders{hint}. Add "
                f"{TEST}/CLASS/, or move the class folders up into {root}: the set is then split 80/20."
            )
        return Splits(train, test, [f"{child.name}/" for child in children if child not in (train, test)])
    _check_classes(root, children, by_kind, with_classes)
    return None


def _check_classes(
    root: Path, children: list[Path], by_kind: dict[str, list[Path]], with_classes: dict[str, list[Path]]
) -> None:
    """Raise InputError for folders named like splits where there is no training split with class folders."""
    if evaluation := with_classes["test"] + with_classes["val"]:
        raise InputError(
            f"{root} has {evaluation[0].name}/ with class folders, but no {TRAIN}/ with class folders. Give "
            f"{evaluation[0]} itself (it is then split 80/20), or add {TRAIN}/CLASS/."
        )
    flat = by_kind["test"] + by_kind["val"] + (by_kind["other"] if by_kind["train"] else [])
    if by_kind["train"] and (flat or len(children) < 3):
        flat = by_kind["train"] + flat
    if flat:
        raise InputError(
            f"{root} has {', '.join(f'{child.name}/' for child in flat)}, named like a split but without class "
            f"folders. Sort its images into {flat[0].name}/CLASS/, or move it elsewhere; if it is a class, rename it."
        )


def notes(root: Path, split_folders: Splits | None, skipped: Counter[str], rotated: int) -> list[str]:
    """Return sentences that state what was left out of a folder and how images were changed.

    Args:
      root: the folder of the data set.
      split_folders: its splits, or None where its folders are the classes.
      skipped: number of skipped files in class folders, by kind.
      rotated: number of images that were rotated by their EXIF orientation.

    Returns:
      The sentences.
    """
    sentences = []
    if split_folders is not None and (split_folders.train.name, split_folders.test.name) != (TRAIN, TEST):
        sentences.append(
            f"{split_folders.train.name}/ is used as the training split, {split_folders.test.name}/ as the test split."
        )
    loose = sorted(p.name for p in root.iterdir() if not p.is_dir() and p.name[0] != ".")
    others = [*(split_folders.others if split_folders else []), *(ascii(name)[1:-1] for name in loose)]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        sentences.append(f"Left out in {root}: {', '.join(others[:5])}{more}.")
    if skipped:
        kinds = ", ".join(f"{count} {ascii(kind)[1:-1]}" for kind, count in skipped.most_common(5))
        sentences.append(f"Left out in class folders: {sum(skipped.values())} files that are not images ({kinds}).")
    if rotated:
        sentences.append(f"{rotated} images were rotated or flipped according to their EXIF orientation.")
    return sentences


def conversion_hint(root: Path) -> str:
    """Return how to convert a data set that is published in another known form, or ""."""
    names = {p.name for p in root.iterdir()}
    if "data_batch_1" in names or {"train", "test", "meta"} <= names:
        return f" {_checks.CIFAR}"
    if any(name.endswith(".mat") for name in names):
        return f" {_checks.SVHN}"
    return ""
