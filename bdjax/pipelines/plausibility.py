"""Checks of data and model, reported beside the numbers: class names, missing classes, implausible accuracies."""

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
"""Largest plausible difference of an accuracy to the recorded one, a fraction."""
_OF_A_CLASS = 5  # images per class, on average, that are needed to look for another order of the classes
_LISTED = 12  # classes that a message lists


def aligned(manifest: Mapping[str, Any], directory: Path, data: Data) -> Data:
    """Permute the labels of a data set into the order of a model's outputs, where both name their classes.

    Args:
      manifest: of the model's directory.
      directory: of the model, for the message.
      data: the data set.

    Returns:
      The data set with permuted labels and a note, or as it is.

    Raises:
      InputError: the names belong to other classes.
    """
    names, data_names = [str(name) for name in manifest["classes"]], list(data.classes)
    if names == data_names or len(names) != len(data_names):
        return data
    outputs = {_plain(name): output for output, name in enumerate(names)}
    if len(outputs) == len(names) and {_plain(name) for name in data_names} == set(outputs):
        order = np.array([outputs[_plain(name)] for name in data_names], np.int32)
        if (order == np.arange(len(order))).all():
            return data
        note = (
            f"The labels of {data.name} were permuted into the order of the model's outputs: "
            f"{_some([f'{name} {output}' for output, name in enumerate(names)])}."
        )
        return replace(
            data,
            y_train=order[data.y_train],
            y_test=order[data.y_test],
            classes=tuple(names),
            notes=(*data.notes, note),
        )
    if _numbered(names) or _numbered(data_names):
        return data
    raise InputError(
        f"{directory} holds a model of the classes {_some(names)}; {data.name} has {_some(data_names)}. Give data of "
        "the model's classes; where they are the same under other names, rename the class folders (or `classes` of the "
        ".npz) to the model's."
    )


def remedy(manifest: Mapping[str, Any], data: Data) -> str:
    """Sentences on how data of another shape or number of classes can be made to fit a model."""
    (height, width, channels), shape = manifest["shape"], data.shape
    sentences = []
    if channels == 3 and shape[2] == 1:
        sentences.append("Grey to RGB: numpy.repeat(x, 3, axis=-1), or mogrify -type TrueColor in a folder of images.")
    elif channels == 1 and shape[2] == 3:
        sentences.append(
            "RGB to grey: mogrify -colorspace Gray -type Grayscale in a folder of images, or PIL's convert('L')."
        )
    elif channels != shape[2]:
        sentences.append(f"The model takes {channels} channels, which no data set here has.")
    if (height, width) != shape[:2]:
        if manifest["kind"] == "imported":
            inside = f", and with --resize {height} they are resized inside the model" if height == width else ""
            sentences.append(
                f"Import the file again with --size {shape[0]},{shape[1]}: the model takes such images{inside}."
            )
        sentences.append(f"Or resize the images: mogrify -resize '{width}x{height}!' in a folder of images.")
    if len(data.classes) != len(manifest["classes"]):
        sentences.append(
            f"Leave out classes that the model does not have ({_some(manifest['classes'])}), and name those without "
            "images in `classes` of an .npz."
        )
    return " ".join(sentences)


def class_names(manifest: Mapping[str, Any], data: Data) -> tuple[str, ...]:
    """Names of the classes: the model's where it has names, else the data set's."""
    names = tuple(str(name) for name in manifest["classes"])
    return data.classes if _numbered(names) or len(names) != len(data.classes) else names


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _numbered(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def about(
    data: Data, manifest: Mapping[str, Any], directory: Path, predictions: np.ndarray, labels: np.ndarray,
    targets: Sequence[int] = (),
) -> dict[str, list[str]]:  # fmt: skip
    """Describe the data and check the predictions of a model on some of it.

    Args:
      data: the data set.
      manifest: of the model's directory.
      directory: of the model.
      predictions: int32 [n], of the model.
      labels: int32 [n], of the same images.
      targets: classes that an attack aims at.

    Returns:
      {"data": sentences about the data set, "warnings": what speaks against the numbers}.
    """
    warnings = of_accuracy(predictions, labels, class_names(manifest, data), recorded_accuracy(manifest, directory))
    return {"data": described(data), "warnings": [*of_data(data, targets), *warnings]}


def of_data(data: Data, targets: Sequence[int] = ()) -> list[str]:
    """Warnings about a data set: classes without images, a target class without images."""
    warnings = []
    counts: dict[str, np.ndarray] = {split: np.bincount(y, minlength=len(data.classes)) for split, y in _splits(data)}
    for split, count in counts.items():
        if empty := [data.classes[label] for label in np.flatnonzero(count == 0)]:
            warnings.append(f"no {split} image of class {_some(empty)}: nothing can be said about it.")
    for target in targets:
        lacking = [split for split, count in counts.items() if target < len(count) and not count[target]]
        if lacking:
            none = " and no ".join(lacking)
            warnings.append(
                f"the attack's target, class {data.classes[target]} ({target}), has no {none} image: is it meant?"
            )
    return warnings


def described(data: Data) -> list[str]:
    """Sentences on a data set: number of classes, images of each, and what was left out."""
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
    predictions: np.ndarray, labels: np.ndarray, classes: Sequence[str], recorded: float | None = None
) -> list[str]:
    """Warn about a clean accuracy that is near chance or far below the recorded one.

    Args:
      predictions: int32 [n].
      labels: int32 [n].
      classes: names of the classes.
      recorded: the accuracy that the model's file or run records, a fraction.

    Returns:
      The warnings; empty when the accuracy is plausible.
    """
    n, correct = len(labels), int((predictions == labels).sum())
    rate, high = correct / n, wilson(correct, n)[1]
    count: np.ndarray = np.bincount(labels, minlength=len(classes))
    chance = max(1 / len(classes), float(count.max()) / n)
    near_chance = chance < 1 and (rate - chance) / (1 - chance) < _NEAR_CHANCE
    is_low = recorded is not None and rate < recorded - _FALLEN and high < recorded
    if not near_chance and not is_low:
        return []
    why = f"far below the recorded {recorded:.4f}" if is_low else f"hardly above chance ({chance:.2f})"
    order, best = "", _best_order(predictions, labels, len(classes))
    if best is not None and best > rate + _NEAR_CHANCE:
        order = f" With the classes in another order it would be {best:.2f}: look at that first."
    return [
        f"the clean accuracy is {rate:.4f} (n = {n}), {why}.{order} The order of the classes (here {_some(classes)}), "
        "the preprocessing (--input-mean, --input-std, --channels, --layout, --resize) or the data set is another one "
        "than the model's; what follows from these labels cannot be trusted."
    ]


def _best_order(predictions: np.ndarray, labels: np.ndarray, classes: int) -> float | None:
    """The accuracy under the best permutation of the labels; None with too few images to tell."""
    if len(labels) < _OF_A_CLASS * classes or classes > 2000:
        return None
    from scipy.optimize import linear_sum_assignment

    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    rows, columns = linear_sum_assignment(-confusion)
    return float(confusion[rows, columns].sum() / len(labels))


def recorded_accuracy(manifest: Mapping[str, Any], directory: Path) -> float | None:
    """The accuracy that the weight file records, or the run of a purified model; None where nothing is recorded."""
    if manifest["kind"] == "purified":
        try:
            recorded = read_record(Path(directory).parent / "result.json")["after"]["acc"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
    else:
        recorded = (manifest.get("source") or {}).get("accuracy")
    return float(recorded) if type(recorded) in (int, float) and 0 <= recorded <= 1 else None


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:_LISTED])) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
