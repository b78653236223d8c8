"""What stands beside weights in a file: normalisation layers, prune masks, class names, an accuracy.

All of it is looked for by the names that people give it, and taken only where it is of the right form.
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
_BACKDOORBENCH = {  # BackdoorBench's, by the data set that its results name
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.5,), (0.5,)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_MAX_CHANNELS = 64
_MOST = 64  # dictionaries, and normalisation layers in one, that are looked at
_NAMES = ("classes", "class_names", "classnames", "class_labels", "label_names", "labels", "categories", "names",
          "idx_to_class", "idx2class", "id2label", "class_to_idx", "class2idx", "label2id")  # fmt: skip
_ACCURACIES = ("acc", "accuracy", "clean_acc", "test_acc", "best_acc", "best_accuracy", "val_acc", "best_acc1", "acc1",
               "test_accuracy", "val_accuracy", "best_prec1", "prec1", "top1")  # fmt: skip
_LONGEST = 200  # characters of a class name


def ignored_tensors(file: Path, dicts: Dicts, ignore: Sequence[str], others: Iterable[str] = ()) -> dict[str, frozenset[str]]:
    """The tensors of each dictionary that `ignore` names: whole names, their ends, their beginnings, or with * and ?.

    Args: others: names of what is no plain tensor, which `ignore` may name, too.
    Raises InputError for a name that no dictionary has.
    """
    others = frozenset(others)
    found: dict[str, set[str]] = {place: set() for place in dicts}
    for wanted in ignore:
        hits = 0
        for place, tensors in dicts.items():
            named = {name for name in tensors if _is_named(name, wanted)}
            found[place] |= named
            hits += len(named)
        if not hits and not any(_is_named(name, wanted) for name in others):
            listed = ", ".join(quote(name) for tensors in dicts.values() for name in list(tensors)[:3])
            raise InputError(f"{file} has no tensor that --ignore {wanted!r} names; there are some such as {listed}.")
    return {place: frozenset(names) for place, names in found.items()}


def _is_named(name: str, wanted: str) -> bool:
    if any(sign in wanted for sign in "*?["):
        return fnmatchcase(name, wanted)
    return name == wanted or name.endswith(f".{wanted}") or name.startswith(f"{wanted}.") or f".{wanted}." in name


def apply_masks(tensors: Mapping[str, Tensor], ignored: frozenset[str]) -> dict[str, Tensor]:
    """Weights that torch.nn.utils.prune split into `X_orig` and `X_mask`: their product, where the mask is ignored."""
    found = {}
    for name, tensor in tensors.items():
        whole = name.removesuffix("_orig")
        mask = f"{whole}_mask"
        if whole != name and mask in ignored and tensors[mask].shape == tensor.shape:
            found[whole] = Tensor(tensor.dtype, tensor.shape, _product(tensor, tensors[mask]))
        elif not (name in ignored and name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in tensors):
            found[name] = tensor
    return found


def _product(one: Tensor, mask: Tensor) -> Any:
    return lambda: one.read() * mask.read().astype(one.read().dtype)


def normalisation(
    file: Path, dicts: Dicts, given: Input | None, ignored: Mapping[str, frozenset[str]] | None = None
) -> tuple[dict[str, Input], dict[str, frozenset[str]]]:
    """What the normalisation layer in each dictionary does to images, and the names of its tensors.

    Numbers for images of 0 to 255 are divided by 255.

    Args: given: what the owner says; ignored: by dictionary, tensors that belong to no such layer.
    Raises InputError when `given` says something else, and for numbers beside weights that are for no images.
    """
    inputs, names = {}, {}
    given = given or Input()
    for place, tensors in list(dicts.items())[:_MOST]:
        left_out = (ignored or {}).get(place, frozenset())
        pairs = list(islice((pair for pair in _pairs(tensors) if not left_out.intersection(pair)), _MOST))
        values = {(_values(tensors[mean]), _values(tensors[std])) for mean, std in pairs}
        if len(values) != 1:
            continue  # none, or several that differ: what they do is not known, so they stay left over
        mean, std = next(iter(values))
        if mean is None or std is None or len(mean) != len(std):
            continue
        if max(mean) > 1 and min(std) > 1:
            mean, std = tuple(part / 255 for part in mean), tuple(part / 255 for part in std)
        if min(mean) < MEANS[0] or max(mean) > MEANS[1] or min(std) < STDS[0] or max(std) >= STDS[1]:
            if not any(_is_kernel(tensor) for tensor in tensors.values()):
                continue  # statistics of something else, beside the weights
            raise InputError(
                f"{file} has a normalisation layer ({quote(pairs[0][0])}: mean {_listed(mean)}, std {_listed(std)}) "
                f"that is not for images in [0, 1]: a mean must be from {MEANS[0]:g} to {MEANS[1]:g}, a std from "
                f"{STDS[0]:g} to less than {STDS[1]:g}. Leave it out with --ignore {visible(','.join(pairs[0]))}, and "
                "give what the owner did by --input-mean and --input-std."
            )
        told = given.mean or given.std
        if told and not (_alike(given.mean or (0.0,), mean) and _alike(given.std or (1.0,), std)):
            raise InputError(
                f"{file} has a normalisation layer ({quote(pairs[0][0])}: mean {_listed(mean)}, std {_listed(std)}), "
                "and --input-mean or --input-std says something else. Leave both flags away."
            )
        inputs[place] = replace(given, mean=mean, std=std)
        names[place] = frozenset(name for pair in pairs for name in pair)
    return inputs, names


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    means = {mean for mean, _ in _NORMALISATION}
    for name in tensors:
        prefix, dot, last = name.rpartition(".")
        for mean, std in _NORMALISATION if last in means else ():
            other = f"{prefix}{dot}{std}"
            if last == mean and other in tensors and all(_is_by_channel(tensors[n]) for n in (name, other)):
                yield name, other


def _is_kernel(tensor: Tensor) -> bool:
    return sum(side > 1 for side in tensor.shape) > 1


def _is_by_channel(tensor: Tensor) -> bool:
    return (
        tensor.dtype in _FLOATS
        and 1 <= prod(tensor.shape) <= _MAX_CHANNELS
        and sum(side > 1 for side in tensor.shape) <= 1
    )


def _values(tensor: Tensor) -> tuple[float, ...] | None:
    values = tensor.read().astype(np.float64).ravel()
    # as short as float32 has them: 0.4914 and not 0.49140000343322754
    return tuple(float(str(np.float32(value))) for value in values) if np.isfinite(values).all() else None


def _alike(given: tuple[float, ...], found: tuple[float, ...]) -> bool:
    return len(given) in (1, len(found)) and bool(np.allclose(given, found, rtol=1e-3))


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def class_names(value: Any, count: int) -> tuple[tuple[str, ...], str] | None:
    """The names of `count` classes that a file tells, in the order of the outputs, and under which key; or None."""
    for place, held in _facts(value, _NAMES):
        names, _ = _names(held, count)
        if names:
            return names, place
    return None


def class_names_problem(value: Any, count: int) -> str | None:
    """Why the class names that a file tells are not those of `count` outputs, where :func:`class_names` takes none."""
    for place, held in _facts(value, _NAMES):
        _, why = _names(held, count)
        if why:
            return f"{quote(place)}: {why}"
    return None


def _names(held: Any, count: int) -> tuple[tuple[str, ...], str]:
    """The names, or why they cannot be used; neither for what is no collection of names."""
    if isinstance(held, dict) and held:
        pairs = list(held.items())
        if all(type(key) is str and type(index) is int for key, index in pairs):  # name -> index
            pairs = [(index, key) for key, index in pairs]
        if sorted(index for index, _ in pairs if type(index) is int) != list(range(len(pairs))):
            return (), f"its numbers are not 0 to {len(pairs) - 1}, each once"
        held = [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
    if not isinstance(held, list | tuple) or not held:
        return (), ""
    if len(held) != count:
        return (), f"{len(held)} names for {count} outputs"
    if not all(type(name) in (str, int) for name in held):
        return (), "not all of them are text or whole numbers"
    # the length before str(): a whole number of a stranger's may have more digits than Python turns into text
    if any(len(name) > _LONGEST if type(name) is str else abs(name) >= 10**_LONGEST for name in held):
        return (), f"one has more than {_LONGEST} characters"
    names = tuple(visible(str(name)) for name in held)
    twice = [name for name, times in Counter(names).items() if times > 1]
    return ((), f"{quote(twice[0])} is there more than once") if twice else (names, "")


def accuracy(value: Any) -> float | None:
    """The accuracy that a file tells of its own weights, as a fraction; or None."""
    for _, held in _facts(value, _ACCURACIES):
        if type(held) in (int, float) and 0 < held <= 100:
            return held / 100 if held > 1 else float(held)
    return None


def _facts(value: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Entries of those names in the file's dictionary and in the dictionaries of that one, but no tensors."""
    if not isinstance(value, dict):
        return
    below = [(f"{key}.", held) for key, held in value.items() if type(key) is str and isinstance(held, dict)]
    for prefix, held in [("", value), *below[:_MOST]]:
        for name in names:
            if name in held and not isinstance(held[name], Tensor):
                yield f"{prefix}{name}", held[name]


def objects_under(key: str, strangers: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """What stands in the dictionary `key`, or in the part of one, and is no plain tensor: name -> its type's name.

    Args: strangers: as :func:`reader.other_objects` finds them.
    """
    if key in strangers:
        return strangers[key]
    found = {}
    for place, held in strangers.items():  # a part of a dictionary: what has its prefix
        begin = key if not place else key.removeprefix(f"{place}.")
        found.update({name: what for name, what in held.items() if name.startswith(f"{begin}.")})
    return found


def check_plain_tensors(file: Path, key: str, found: Mapping[str, str], ignore: Sequence[str]) -> None:
    """Raise InputError when the dictionary that was chosen holds tensors that are not plain ones (sparse, quantised,
    complex ..), for what they do is not known. Objects that are no tensors are listed as skipped, as elsewhere.

    Args: found: as :func:`objects_under` finds it.
    """
    strange = {name: what for name, what in found.items() if is_tensor(what) and not _is_any(name, ignore)}
    if strange:
        listed = ", ".join(f"{quote(name)} ({quote(what)[1:-1]})" for name, what in list(strange.items())[:5])
        raise InputError(
            f"{file} is not read: among the weights{f' under {key!r}' if key else ''} stands what is no plain tensor: "
            f"{listed}. Save plain tensors alone, or leave it out with --ignore {quote(next(iter(strange)))[1:-1]}."
        )


def _is_any(name: str, ignore: Sequence[str]) -> bool:
    return any(_is_named(name, one) for one in ignore)


def backdoorbench_facts(
    told: Mapping[Any, Any], classes: int | None, size: tuple[int, int] | None, input: Input | None
) -> tuple[int | None, tuple[int, int] | None, Input | None]:
    """(classes, size, input) as given, else as BackdoorBench writes them beside its weights."""
    if input is None and type(told.get("clean_data")) is str and told["clean_data"] in _BACKDOORBENCH:
        input = Input(*_BACKDOORBENCH[told["clean_data"]])
    return classes or _number(told.get("num_classes")), size or _size(told), input


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 1 else None


def _size(facts: Mapping[Any, Any]) -> tuple[int, int] | None:
    """BackdoorBench's img_size: height, width, channels."""
    found = facts.get("img_size")
    if isinstance(found, list | tuple) and len(found) == 3 and all(type(side) is int for side in found):
        return (found[0], found[1]) if min(found) > 0 and max(found) < 10_000 else None
    return None
