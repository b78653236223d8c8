"""How a folder of images is laid out: which folders are splits, which are classes, and what is neither."""

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
_BESIDE = ("meta", "metadata", "annotations", "labels")  # of sets that are published so, beside their splits
_MOST_FILES = 20_000_000  # a link that leads in circles ends here at the latest


class Splits(NamedTuple):
    """The folders that are taken as the two splits, and those beside them."""

    train: Path
    test: Path
    beside: list[str]


_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "__pycache__")


def folders(path: Path) -> list[Path]:
    """The folders in `path` but hidden ones and those that systems make.

    By number where all names are numbers, else in code-point order.

    Raises InputError for a name that is not UTF-8.
    """
    if not path.is_dir():
        return []
    children = [p for p in path.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in _SYSTEMS]
    for one in children:
        _checks.check_text(f"a folder in {ascii(str(path))[1:-1]}", one.name)
    if all(one.name.isascii() and one.name.isdigit() for one in children):
        return sorted(children, key=lambda one: (int(one.name), one.name))
    return sorted(children)


def files(folder: Path) -> Iterator[Path]:
    """Files at any depth below a folder, through links; a folder that was seen is not gone into again."""
    seen, count = set(), 0
    for at, below, names in os.walk(folder, followlinks=True):
        here = os.stat(at)
        if (here.st_dev, here.st_ino) in seen:
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        for name in names:
            count += 1
            if count > _MOST_FILES:
                raise InputError(f"{folder} has more than {_MOST_FILES} files. Give a smaller folder.")
            yield Path(at, name)


def splits(root: Path) -> Splits | None:
    """The two splits in `root`, or None where its folders are the classes.

    Raises InputError where some look like splits, and yet the two that are needed cannot be told.
    """
    named = folders(root)
    kinds = {
        kind: [one for one in named if one.name.lower() in names]
        for kind, names in (("train", _TRAINING), ("test", _TESTING), ("val", _VALIDATION), ("beside", _BESIDE))
    }
    whole = {kind: [one for one in found if folders(one)] for kind, found in kinds.items()}
    for found in whole.values():
        if len(found) > 1:
            twice = " and ".join(f"{one.name}/" for one in found)
            raise InputError(f"{root} has {twice}, which both look like one split. Move one of them away.")
    if whole["train"]:
        train = whole["train"][0]
        test = next(iter(whole["test"] or whole["val"]), None)
        if test is None:
            flat = [one.name for one in kinds["test"] + kinds["val"]]
            more = f" ({', '.join(flat)}/ has no class folders in it: sort its images into them)" if flat else ""
            raise InputError(
                f"{root} has {train.name}/ with class folders, but no such {TEST}/{more}. Add {TEST}/CLASS/, or "
                f"move the class folders up into {root}: the set is then split 80/20."
            )
        return Splits(train, test, [f"{one.name}/" for one in named if one not in (train, test)])
    _check_classes(root, named, kinds, whole)
    return None


def _check_classes(root: Path, named: list[Path], kinds: dict[str, list[Path]], whole: dict[str, list[Path]]) -> None:
    """Refuse folders that are splits by their names, where there is no training split with classes in it."""
    if alone := whole["test"] + whole["val"]:
        raise InputError(
            f"{root} has {alone[0].name}/ with class folders, but no {TRAIN}/ such. Give {alone[0]} itself (it is then "
            f"split 80/20), or add {TRAIN}/CLASS/."
        )
    flat = kinds["test"] + kinds["val"] + (kinds["beside"] if kinds["train"] else [])
    if kinds["train"] and (flat or len(named) < 3):
        flat = kinds["train"] + flat
    if flat:
        raise InputError(
            f"{root} has {', '.join(f'{one.name}/' for one in flat)}, by the name a split and no class, with no class "
            f"folders in it. Sort its images into {flat[0].name}/CLASS/, or move it away; a class of that name needs "
            "another one."
        )


def notes(root: Path, found: Splits | None, left: Counter[str], turned: int) -> list[str]:
    """What was left out, and done, of the folder `root`: sentences."""
    said = []
    if found is not None and (found.train.name, found.test.name) != (TRAIN, TEST):
        said.append(f"{found.train.name}/ is taken as the training split, {found.test.name}/ as the test split.")
    loose = sorted(p.name for p in root.iterdir() if not p.is_dir() and p.name[0] != ".")
    beside = [*(found.beside if found else []), *(ascii(name)[1:-1] for name in loose)]
    if beside:
        more = f" and {len(beside) - 5} more" if len(beside) > 5 else ""
        said.append(f"Left out in {root}: {', '.join(beside[:5])}{more}.")
    if left:
        kinds = ", ".join(f"{count} {ascii(kind)[1:-1]}" for kind, count in left.most_common(5))
        said.append(f"Left out in class folders: {sum(left.values())} files that are no images ({kinds}).")
    if turned:
        said.append(f"{turned} images were turned, as their EXIF orientation says.")
    return said


def remedy(root: Path) -> str:
    """What to do with a set that is published in another form, "" where it is none that is known."""
    names = {p.name for p in root.iterdir()}
    if "data_batch_1" in names or {"train", "test", "meta"} <= names:
        return f" {_checks.CIFAR}"
    if any(name.endswith(".mat") for name in names):
        return f" {_checks.SVHN}"
    return ""
