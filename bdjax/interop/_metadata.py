"""Facts in a weight file beside the weights: normalisation layers, prune masks, class names, an accuracy.

They are searched by their common names and used only when they have the expected form.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.interop._globals import is_tensor
from bdjax.interop._tensors import Tensor, quote
from bdjax.models import MEANS, STDS, Input
from bdjax.text import visible

Dicts = Mapping[str, Mapping[str, Tensor]]
_NORMALISATION = (
    ("mean", "std"), ("means", "stds"), ("means", "sds"), ("mu", "sigma"), ("_mean", "_std"), ("mean", "stddev"),
    ("new_mean", "new_std"), ("pixel_mean", "pixel_std"), ("data_mean", "data_std"), ("input_mean", "input_std"),
    ("norm_mean", "norm_std"), ("image_mean", "image_std"),
)  # fmt: skip
_BACKDOORBENCH = {  # BackdoorBench's mean and std by data set
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.5,), (0.5,)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_MAX_CHANNELS = 64
_LIMIT = 64  # largest number of dictionaries, and of normalisation layers in one, that are examined
_NAMES = ("classes", "class_names", "classnames", "class_labels", "label_names", "labels", "categories", "names",
          "idx_to_class", "idx2class", "id2label", "class_to_idx", "class2idx", "label2id")  # fmt: skip
_ACCURACIES = ("acc", "accuracy", "clean_acc", "test_acc", "best_acc", "best_accuracy", "val_acc", "best_acc1", "acc1",
               "test_accuracy", "val_accuracy", "best_prec1", "prec1", "top1")  # fmt: skip
_LONGEST = 200  # characters of a class name


def ignored_tensors(
    file: Path, dicts: Dicts, ignore: Sequence[str], others: Iterable[str] = ()
) -> dict[str, frozenset[str]]:
    """Select the tensors of each dictionary that `ignore` names.

    Args:
      file: path of the weight file, for messages.
      dicts: dictionaries of tensors by their place in the file.
      ignore: names, parts of names between dots, or patterns with * and ?.
      others: names of objects that are not tensors, which `ignore` may name, too.

    Returns:
      Place of the dictionary -> names of the selected tensors.

    Raises:
      InputError: when an entry of `ignore` matches no name.
    """
    others = frozenset(others)
    selected: dict[str, set[str]] = {place: set() for place in dicts}
    for pattern in ignore:
        count = 0
        for place, tensors in dicts.items():
            matches = {name for name in tensors if _is_named(name, pattern)}
            selected[place] |= matches
            count += len(matches)
        if not count and not any(_is_named(name, pattern) for name in others):
            listed = ", ".join(quote(name) for tensors in dicts.values() for name in list(tensors)[:3])
            raise InputError(f"{file} has no tensor that --ignore {pattern!r} names; there are some such as {listed}.")
    return {place: frozenset(names) for place, names in selected.items()}


def _is_named(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern, or contains it between dots."""
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}") or name.startswith(f"{pattern}.") or f".{pattern}." in name


def apply_masks(tensors: Mapping[str, Tensor], ignored: frozenset[str]) -> dict[str, Tensor]:
    """Replace the pairs `X_orig` and `X_mask` of torch.nn.utils.prune by their product, where the mask is ignored."""
    merged = {}
    for name, tensor in tensors.items():
        weight = name.removesuffix("_orig")
        mask = f"{weight}_mask"
        if weight != name and mask in ignored and tensors[mask].shape == tensor.shape:
            merged[weight] = Tensor(tensor.dtype, tensor.shape, _product(tensor, tensors[mask]))
        elif not (name in ignored and name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in tensors):
            merged[name] = tensor
    return merged


def _product(weight: Tensor, mask: Tensor) -> Any:
    return lambda: weight.read() * mask.read().astype(weight.read().dtype)


def normalisation(
    file: Path, dicts: Dicts, stated: Input | None, ignored: Mapping[str, frozenset[str]] | None = None
) -> tuple[dict[str, Input], dict[str, frozenset[str]]]:
    """Find the input normalisation layer in each dictionary.

    Values for images of 0 to 255 are divided by 255.

    Args:
      file: path of the weight file, for messages.
      dicts: dictionaries of tensors by their place in the file.
      stated: preprocessing that the user stated, or None.
      ignored: by dictionary, tensors that are not part of such a layer.

    Returns:
      (place of the dictionary -> preprocessing, place -> names of the layer's tensors).

    Raises:
      InputError: when the layer contradicts `stated`, or its values are not for images in [0, 1].
    """
    inputs, names = {}, {}
    stated = stated or Input()
    for place, tensors in list(dicts.items())[:_LIMIT]:
        excluded = (ignored or {}).get(place, frozenset())
        pairs = list(islice((pair for pair in _pairs(tensors) if not excluded.intersection(pair)), _LIMIT))
        values = {(_values(tensors[mean]), _values(tensors[std])) for mean, std in pairs}
        if len(values) != 1:
            continue  # none, or several different layers, whose effect is unknown: they are reported as left over
        mean, std = next(iter(values))
        if mean is None or std is None or len(mean) != len(std):
            continue
        if max(mean) > 1 and min(std) > 1:
            mean, std = tuple(part / 255 for part in mean), tuple(part / 255 for part in std)
        if min(mean) < MEANS[0] or max(mean) > MEANS[1] or min(std) < STDS[0] or max(std) >= STDS[1]:
            if not any(_is_kernel(tensor) for tensor in tensors.values()):
                continue  # statistics of something else beside the weights
            raise InputError(
                f"{file} has a normalisation layer ({quote(pairs[0][0])}: mean {_listed(mean)}, std {_listed(std)}) "
                f"that is not for images in [0, 1]: a mean must be from {MEANS[0]:g} to {MEANS[1]:g}, a std from "
                f"{STDS[0]:g} to less than {STDS[1]:g}. Leave it out with --ignore {visible(','.join(pairs[0]))}, and "
                "give what the owner did by --input-mean and --input-std."
            )
        is_stated = stated.mean or stated.std
        if is_stated and not (_agree(stated.mean or (0.0,), mean) and _agree(stated.std or (1.0,), std)):
            raise InputError(
                f"{file} has a normalisation layer ({quote(pairs[0][0])}: mean {_listed(mean)}, std {_listed(std)}), "
                "and --input-mean or --input-std contradicts it. Omit both flags."
            )
        inputs[place] = replace(stated, mean=mean, std=std)
        names[place] = frozenset(name for pair in pairs for name in pair)
    return inputs, names


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the names of the mean and the std of every normalisation layer."""
    means = {mean for mean, _ in _NORMALISATION}
    for name in tensors:
        prefix, dot, last = name.rpartition(".")
        for mean, std in _NORMALISATION if last in means else ():
            other = f"{prefix}{dot}{std}"
            if last == mean and other in tensors and all(_is_by_channel(tensors[n]) for n in (name, other)):
                yield name, other


def _is_kernel(tensor: Tensor) -> bool:
    """Whether a tensor has more than one axis."""
    return sum(side > 1 for side in tensor.shape) > 1


def _is_by_channel(tensor: Tensor) -> bool:
    """Whether a tensor has one value per channel."""
    return (
        tensor.dtype in _FLOATS
        and 1 <= prod(tensor.shape) <= _MAX_CHANNELS
        and sum(side > 1 for side in tensor.shape) <= 1
    )


def _values(tensor: Tensor) -> tuple[float, ...] | None:
    """Return the values of a tensor, or None when one is not finite."""
    values = tensor.read().astype(np.float64).ravel()
    # rounded to the shortest decimal of float32: 0.4914 and not 0.49140000343322754
    return tuple(float(str(np.float32(value))) for value in values) if np.isfinite(values).all() else None


def _agree(stated: tuple[float, ...], stored: tuple[float, ...]) -> bool:
    """Whether the values by channel agree; a single stated value is for all channels."""
    return len(stated) in (1, len(stored)) and bool(np.allclose(stated, stored, rtol=1e-3))


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def class_names(value: Any, count: int) -> tuple[tuple[str, ...], str] | None:
    """Return the names of `count` classes in a file, in the order of the outputs, and their key; None without them."""
    for place, entry in _entries(value, _NAMES):
        names, _ = _names(entry, count)
        if names:
            return names, place
    return None


def class_names_problem(value: Any, count: int) -> str | None:
    """Return why the class names in a file do not fit `count` outputs, or None without such a problem."""
    for place, entry in _entries(value, _NAMES):
        _, problem = _names(entry, count)
        if problem:
            return f"{quote(place)}: {problem}"
    return None


def _names(entry: Any, count: int) -> tuple[tuple[str, ...], str]:
    """Return (names, problem), one of them empty; both are empty when the entry is not a collection of names."""
    if isinstance(entry, dict) and entry:
        pairs = list(entry.items())
        if all(type(key) is str and type(index) is int for key, index in pairs):  # name -> index
            pairs = [(index, key) for key, index in pairs]
        if sorted(index for index, _ in pairs if type(index) is int) != list(range(len(pairs))):
            return (), f"its numbers are not 0 to {len(pairs) - 1}, each once"
        entry = [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
    if not isinstance(entry, list | tuple) or not entry:
        return (), ""
    if len(entry) != count:
        return (), f"{len(entry)} names for {count} outputs"
    if not all(type(name) in (str, int) for name in entry):
        return (), "not all of them are text or whole numbers"
    # checked before str(), because an integer may have more digits than Python converts to text
    if any(len(name) > _LONGEST if type(name) is str else abs(name) >= 10**_LONGEST for name in entry):
        return (), f"one has more than {_LONGEST} characters"
    names = tuple(visible(str(name)) for name in entry)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    return ((), f"{quote(repeated[0])} occurs more than once") if repeated else (names, "")


def accuracy(value: Any) -> float | None:
    """Return the accuracy of the weights that a file states, as a fraction; None without one."""
    for _, entry in _entries(value, _ACCURACIES):
        if type(entry) in (int, float) and 0 < entry <= 100:
            return entry / 100 if entry > 1 else float(entry)
    return None


def _entries(value: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the entries with one of the names, except tensors, in the file's dictionary and one level below."""
    if not isinstance(value, dict):
        return
    below = [(f"{key}.", inner) for key, inner in value.items() if type(key) is str and isinstance(inner, dict)]
    for prefix, dictionary in [("", value), *below[:_LIMIT]]:
        for name in names:
            if name in dictionary and not isinstance(dictionary[name], Tensor):
                yield f"{prefix}{name}", dictionary[name]


def objects_under(key: str, objects: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """Return the objects in the dictionary `key`, or in a part of one, that are not plain tensors: name -> type.

    `objects` is the result of :func:`bdjax.interop.reader.other_objects`.
    """
    if key in objects:
        return objects[key]
    selected = {}
    for place, types in objects.items():  # for a part of a dictionary: the names with its prefix
        prefix = key if not place else key.removeprefix(f"{place}.")
        selected.update({name: kind for name, kind in types.items() if name.startswith(f"{prefix}.")})
    return selected


def check_plain_tensors(file: Path, key: str, objects: Mapping[str, str], ignore: Sequence[str]) -> None:
    """Raise InputError when the chosen dictionary holds tensors that are not plain (sparse, quantised, complex).

    Their effect on the network is unknown. Objects that are not tensors are listed as skipped.

    Args:
      file: path of the weight file, for messages.
      key: place of the dictionary in the file.
      objects: result of :func:`objects_under`.
      ignore: names that the user excluded.

    Raises:
      InputError: when there is such a tensor.
    """
    unreadable = {name: kind for name, kind in objects.items() if is_tensor(kind) and not _is_any(name, ignore)}
    if unreadable:
        listed = ", ".join(f"{quote(name)} ({quote(kind)[1:-1]})" for name, kind in list(unreadable.items())[:5])
        place = f" under {key!r}" if key else ""
        raise InputError(
            f"{file} is not read: the weights{place} contain objects that are not plain tensors: {listed}. "
            f"Save plain tensors only, or exclude them with --ignore {quote(next(iter(unreadable)))[1:-1]}."
        )


def _is_any(name: str, ignore: Sequence[str]) -> bool:
    return any(_is_named(name, pattern) for pattern in ignore)


def backdoorbench_facts(
    entries: Mapping[Any, Any], classes: int | None, size: tuple[int, int] | None, input: Input | None
) -> tuple[int | None, tuple[int, int] | None, Input | None]:
    """Fill in facts that the user did not state from BackdoorBench's entries in a file.

    Args:
      entries: the dictionary in the file.
      classes: number of classes that the user stated, or None.
      size: (H, W) that the user stated, or None.
      input: preprocessing that the user stated, or None.

    Returns:
      (classes, size, input), None where unknown.
    """
    if input is None and type(entries.get("clean_data")) is str and entries["clean_data"] in _BACKDOORBENCH:
        input = Input(*_BACKDOORBENCH[entries["clean_data"]])
    return classes or _class_count(entries.get("num_classes")), size or _size(entries), input


def _class_count(value: Any) -> int | None:
    return value if type(value) is int and value > 1 else None


def _size(facts: Mapping[Any, Any]) -> tuple[int, int] | None:
    """Return (H, W) of BackdoorBench's img_size (height, width, channels), or None."""
    size = facts.get("img_size")
    if isinstance(size, list | tuple) and len(size) == 3 and all(type(side) is int for side in size):
        return (size[0], size[1]) if min(size) > 0 and max(size) < 10_000 else None
    return None
