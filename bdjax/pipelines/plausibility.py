"""What a user must be told of data and model before the numbers: classes that do not fit, accuracies that cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.io.files import read_record
from bdjax.metrics import wilson
from bdjax.types import Data

_NEAR_CHANCE = 0.3
"""Chance-corrected accuracy, (accuracy - chance) / (1 - chance), below which something must be wrong."""
_FALLEN = 0.1
"""How far an accuracy may lie below the recorded one."""
_OF_A_CLASS = 5  # images of each class, on average, that another order of the classes is looked for by
_SHOWN = 12  # classes that are listed


def aligned(manifest: Mapping[str, Any], directory: Path, data: Data) -> Data:
    """`data` with its labels in the order of the model's outputs, where both name their classes.

    Raises InputError when the names are of other classes.
    """
    own, given = [str(name) for name in manifest["classes"]], list(data.classes)
    if own == given or len(own) != len(given):
        return data
    places = {_plain(name): place for place, name in enumerate(own)}
    if len(places) == len(own) and {_plain(name) for name in given} == set(places):
        to = np.array([places[_plain(name)] for name in given], np.int32)
        if (to == np.arange(len(to))).all():
            return data
        said = (
            f"The classes of {data.name} were brought to the order of the model's outputs: "
            f"{_some([f'{name} {place}' for place, name in enumerate(own)])}."
        )
        return replace(
            data, y_train=to[data.y_train], y_test=to[data.y_test], classes=tuple(own), notes=(*data.notes, said)
        )
    if _numbered(own) or _numbered(given):
        return data
    raise InputError(
        f"{directory} holds a model of the classes {_some(own)}; {data.name} has {_some(given)}. Give data of the "
        "model's classes; where they are the same under other names, rename the class folders (or `classes` of the "
        ".npz) to the model's."
    )


def remedy(manifest: Mapping[str, Any], data: Data) -> str:
    """How data of another shape or number of classes, and the model, come together: sentences."""
    (height, width, channels), own = manifest["shape"], data.shape
    found = []
    if channels == 3 and own[2] == 1:
        found.append("Grey to RGB: numpy.repeat(x, 3, axis=-1), or mogrify -type TrueColor in a folder of images.")
    elif channels == 1 and own[2] == 3:
        found.append(
            "RGB to grey: mogrify -colorspace Gray -type Grayscale in a folder of images, or PIL's convert('L')."
        )
    elif channels != own[2]:
        found.append(f"The model takes {channels} channels, which no data set here has.")
    if (height, width) != own[:2]:
        if manifest["kind"] == "imported":
            inside = f", and with --resize {height} they are resized inside the model" if height == width else ""
            found.append(f"Import the file again with --size {own[0]},{own[1]}: the model takes such images{inside}.")
        found.append(f"Or resize the images: mogrify -resize '{width}x{height}!' in a folder of images.")
    if len(data.classes) != len(manifest["classes"]):
        found.append(
            f"Leave out classes that the model does not have ({_some(manifest['classes'])}), and name those without "
            "images in `classes` of an .npz."
        )
    return " ".join(found)


def class_names(manifest: Mapping[str, Any], data: Data) -> tuple[str, ...]:
    """What to call the classes: the model's names where it has some, else the data set's."""
    own = tuple(str(name) for name in manifest["classes"])
    return data.classes if _numbered(own) or len(own) != len(data.classes) else own


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _numbered(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def about(
    data: Data, manifest: Mapping[str, Any], directory: Path, guesses: np.ndarray, labels: np.ndarray,
    targets: Sequence[int] = (),
) -> dict[str, list[str]]:  # fmt: skip
    """{"data", "warnings"}: what a result says of its images, and of a model's guesses on some of them."""
    found = of_accuracy(guesses, labels, class_names(manifest, data), recorded_accuracy(manifest, directory))
    return {"data": described(data), "warnings": [*of_data(data, targets), *found]}


def of_data(data: Data, targets: Sequence[int] = ()) -> list[str]:
    """What is odd about a data set: classes without images, a target without images."""
    found = []
    counts: dict[str, np.ndarray] = {split: np.bincount(y, minlength=len(data.classes)) for split, y in _splits(data)}
    for split, count in counts.items():
        if empty := [data.classes[label] for label in np.flatnonzero(count == 0)]:
            found.append(f"no {split} image of class {_some(empty)}: what is said of it rests on nothing.")
    for target in targets:
        lacking = [split for split, count in counts.items() if target < len(count) and not count[target]]
        if lacking:
            none = " and no ".join(lacking)
            found.append(
                f"the attack's target, class {data.classes[target]} ({target}), has no {none} image: is it meant?"
            )
    return found


def described(data: Data) -> list[str]:
    """The number of classes, the images of each, and what was left out: sentences."""
    lines = [f"{data.name}: {len(data.classes)} classes, images {'x'.join(map(str, data.shape))}."]
    for split, labels in _splits(data):
        count: np.ndarray = np.bincount(labels, minlength=len(data.classes))
        each = _some([f"{name} {number}" for name, number in zip(data.classes, count, strict=True)])
        least, most = count.min(), count.max()
        lines.append(f"{len(labels)} {split} images, {least}{f' to {most}' if most > least else ''} a class: {each}.")
    return [*lines, *data.notes]


def _splits(data: Data) -> tuple[tuple[str, np.ndarray], ...]:
    return ("training", data.y_train), ("test", data.y_test)


def of_accuracy(
    guesses: np.ndarray, labels: np.ndarray, classes: Sequence[str], recorded: float | None = None
) -> list[str]:
    """What speaks against a clean accuracy: it is near chance, or far below the recorded one."""
    n, right = len(labels), int((guesses == labels).sum())
    rate, high = right / n, wilson(right, n)[1]
    count: np.ndarray = np.bincount(labels, minlength=len(classes))
    chance = max(1 / len(classes), float(count.max()) / n)
    near = chance < 1 and (rate - chance) / (1 - chance) < _NEAR_CHANCE
    fallen = recorded is not None and rate < recorded - _FALLEN and high < recorded
    if not near and not fallen:
        return []
    why = f"far below the recorded {recorded:.4f}" if fallen else f"hardly above chance ({chance:.2f})"
    order, best = "", _best_order(guesses, labels, len(classes))
    if best is not None and best > rate + _NEAR_CHANCE:
        order = f" With the classes in another order it would be {best:.2f}: look at that first."
    return [
        f"the clean accuracy is {rate:.4f} (n = {n}), {why}.{order} The order of the classes (here {_some(classes)}), "
        "the preprocessing (--input-mean, --input-std, --channels, --layout, --resize) or the data set is another one "
        "than the model's; what follows from these labels cannot be trusted."
    ]


def _best_order(guesses: np.ndarray, labels: np.ndarray, classes: int) -> float | None:
    """The accuracy under the best exchange of labels; None of too few images to tell."""
    if len(labels) < _OF_A_CLASS * classes or classes > 2000:
        return None
    from scipy.optimize import linear_sum_assignment

    together = np.zeros((classes, classes), np.int64)
    np.add.at(together, (labels, guesses), 1)
    rows, columns = linear_sum_assignment(-together)
    return float(together[rows, columns].sum() / len(labels))


def recorded_accuracy(manifest: Mapping[str, Any], directory: Path) -> float | None:
    """What the weight file tells, or the run that a purified model is of; None where nothing is recorded."""
    if manifest["kind"] == "purified":
        try:
            told = read_record(Path(directory).parent / "result.json")["after"]["acc"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
    else:
        told = (manifest.get("source") or {}).get("accuracy")
    return float(told) if type(told) in (int, float) and 0 <= told <= 1 else None


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
