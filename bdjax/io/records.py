"""What stands in a directory's records is a stranger's word: types are checked before a value is used.

A record is JSON. `from_plain` makes a Config of it, `check_manifest` looks at a model directory's: every field that is read
later is there and of its type, every method that it names is installed, and no text in it makes code run.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

from bdjax import registry
from bdjax.errors import InputError
from bdjax.text import visible

KINDS = ("victim", "imported", "purified", "reactivated")
MAX_SIDE = 4096
"""Pixels of an image's side, at most."""
MAX_CLASSES = 100_000
_MAX_CHANNELS = 64
_MAX_WIDTH = 1 << 16  # of a first convolution
_Number = int | float
_CONFIG = {"name": str, "config": dict}
_NEEDED: dict[str, Any] = {
    "kind": str, "model": str, "hash": str, "seed": int, "fit": dict | None, "shape": tuple[int, int, int],
    "classes": tuple[str, ...], "attack": _CONFIG | {"": None}, "seconds": {"attack": _Number, "compile": _Number},
    "dataset": {"spec": str, "name": str, "fingerprint": str, "": None},
}  # fmt: skip
_KNOWN: dict[str, Any] = {  # where they are there
    "width": int | None, "input": dict | None, "env": dict, "curve": list, "split": dict, "victim_hash": str,
    "variant": dict, "assumed": dict, "tried": list, "note": str,
    "defense": _CONFIG | {"seed": int, "": None}, "reactivation": _CONFIG | {"": None},
    "poison": {"n": int, "copies": int, "sha256": str, "": None},
    "source": {
        "file": str, "sha256": str, "format": str, "names": str, "key": str, "prefix": str,
        "tensors": tuple[tuple[str, str, tuple[int, ...]], ...], "kept": tuple[str, ...],
        "skipped?": dict[str, str], "ignored?": tuple[str, ...], "normalised?": tuple[str, ...],
        "classes?": str | None, "unnamed?": str | None, "accuracy?": float | None,
    },
}  # fmt: skip
_WRONG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@contextmanager
def reading_record(path: Path) -> Iterator[None]:
    """Turn what a damaged record raises in the block into one line that names it. Raises InputError."""
    try:
        yield
    except InputError:
        raise
    except _WRONG as error:
        why = visible(f"{type(error).__name__}: {error}")[:200]
        raise InputError(f"{path} is damaged or not ours ({why}). Remove it and run again, or restore it.") from None


def make_visible(value: Any) -> Any:
    """A value of JSON with every text in it made visible, for tables and pages."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [make_visible(one) for one in value]
    return {visible(name): make_visible(one) for name, one in value.items()} if isinstance(value, dict) else value


def check_manifest(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A model directory's manifest as it may be used: class names are made visible, files of code are found again.

    Args: path: of the manifest, for messages.
    Raises InputError, one line, when a field is missing, of another type or out of range, when a method is not
    installed, and when a text names code that the user has not named as well.
    """
    manifest = dict(manifest)
    try:
        for name, kind in _NEEDED.items():
            if name not in manifest:
                raise InputError(f"{name} is missing")
            _check(name, manifest[name], kind)
        for name, kind in _KNOWN.items():
            if name in manifest:
                _check(name, manifest[name], kind)
        _check_values(manifest)
        manifest |= _names(manifest)
    except InputError as error:
        raise InputError(f"{path} is damaged or not ours: {visible(str(error))}") from None
    for field, name in (("dataset", "name"), ("source", "file")):
        if (own := manifest.get(field)) is not None:
            manifest[field] = {**own, name: visible(own[name])}
    return manifest | {"classes": [visible(name) for name in manifest["classes"]]}


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise InputError when `value` is not of `kind`: an annotation, or fields with theirs.

    Fields "": or nothing in their place; "NAME?": may be missing.
    """
    if not isinstance(kind, dict):
        if not matches_type(value, kind):
            raise InputError(f"{name} is {_describe_value(value)}, not {_describe_type(kind)}.")
    elif value is not None or "" not in kind:
        if not isinstance(value, dict):
            raise InputError(f"{name} is {_describe_value(value)}, not fields and values.")
        for field, own in kind.items():
            own_name = field.removesuffix("?")
            if own_name in value and own_name:
                _check(f"{name}.{own_name}", value[own_name], own)
            elif field and own_name == field:
                raise InputError(f"{name}.{field} is missing.")


def _check_values(manifest: dict[str, Any]) -> None:
    kind, (height, width, channels) = manifest["kind"], manifest["shape"]
    if kind not in KINDS:
        raise InputError(f"kind is {_describe_value(kind)}, not one of {', '.join(KINDS)}.")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and 1 <= channels <= _MAX_CHANNELS):
        raise InputError(
            f"shape is {list(manifest['shape'])}; images have sides of 1 to {MAX_SIDE} pixels and at most "
            f"{_MAX_CHANNELS} channels."
        )
    for place, text in (("hash", manifest["hash"]), ("victim_hash", manifest.get("victim_hash", "0" * 64))):
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise InputError(f"{place} is {_describe_value(text)}, not 64 hexadecimal digits.")
    if not 2 <= (count := len(manifest["classes"])) <= MAX_CLASSES:
        raise InputError(f"classes are {count}; there are 2 to {MAX_CLASSES}.")
    if not 1 <= (manifest.get("width") or 1) <= _MAX_WIDTH:
        raise InputError(f"width is {manifest['width']}; it is 1 to {_MAX_WIDTH} channels.")
    for place, seed in (("seed", manifest["seed"]), ("defense.seed", (manifest.get("defense") or {}).get("seed", 0))):
        if not 0 <= seed < 1 << 32:
            raise InputError(f"{place} is {_describe_value(seed)}; it is 0 to {(1 << 32) - 1}.")
    needs = {"imported": ("source",), "purified": ("defense", "split"), "reactivated": ("reactivation",)}
    for name in needs.get(kind, ()):
        if manifest.get(name) is None:
            raise InputError(f"{name} is missing, which a directory of kind {kind} has.")
    if kind != "imported" and (manifest["attack"] is None or manifest["dataset"] is None):
        raise InputError(f"attack or dataset is missing, which a directory of kind {kind} has.")


def _names(manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields that name methods, as :func:`bdjax.registry.recorded` gives them."""
    found: dict[str, Any] = {"model": _recorded("model", "models", manifest["model"])}
    for field, kind in (("attack", "attacks"), ("defense", "defenses"), ("reactivation", "attacks")):
        if (own := manifest.get(field)) is not None:
            name = _recorded(f"{field}.name", kind, own["name"])
            found[field] = {**own, "name": name, "config": _without_code(f"{field}.config", own["config"])}
    for field in ("fit", "split", "input"):
        if manifest.get(field) is not None:
            found[field] = _without_code(field, manifest[field])
    if (dataset := manifest["dataset"]) is not None:
        source, colon, rest = dataset["spec"].partition(":")
        source = _recorded("dataset.spec", "datasets", source)
        found["dataset"] = {**dataset, "spec": f"{source}{colon}{rest}"}
    return found


def _recorded(field: str, kind: str, name: str) -> str:
    try:
        return registry.recorded(kind, name)
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def _without_code(field: str, value: Any, depth: int = 8) -> Any:
    """The values of a Config, in which a solver or a part may be a file of code: the user's own is found again."""
    if depth == 0:
        raise InputError(f"{field} nests too deeply.")
    if isinstance(value, str):
        name, colon, rest = value.partition(":")
        if not name.endswith(".py"):
            name, colon, rest = value, "", ""
        try:
            return f"{registry.recorded_file(name)}{colon}{rest}" if name.endswith(".py") else value
        except InputError as error:
            raise InputError(f"{field}: {error}") from None
    if isinstance(value, list):
        return [_without_code(field, one, depth - 1) for one in value]
    if isinstance(value, dict):
        return {name: _without_code(f"{field}.{name}", one, depth - 1) for name, one in value.items()}
    return value


def from_plain(kind: type, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a record's values, each of its field's type.

    Args: where: the record and its field, for messages.
    Raises InputError for a field that the class does not have, a value of another type, and what the class refuses.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} is {_describe_value(values)}, not fields and values.")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(str(name) for name in set(values) - {field.name for field in dataclasses.fields(kind)}):
        listed = ", ".join(map(visible, unknown[:5]))
        raise InputError(f"{where} ({kind.__module__}) has no field {listed}; it is of another version.")
    found = {name: _from_json_value(hints[name], value) for name, value in values.items()}
    for name, value in found.items():
        if not matches_type(value, hints[name]):
            raise InputError(f"{where}: {name} is {_describe_value(value)}, not {_describe_type(hints[name])}.")
    try:
        return kind(**found)
    except (TypeError, LookupError, OverflowError) as error:
        raise InputError(f"{where} makes no {kind.__module__}.{kind.__name__} ({visible(str(error))}).") from None


def _from_json_value(hint: Any, value: Any) -> Any:
    """A value as it was before JSON: a list is a tuple, "inf" a number where one belongs."""
    if isinstance(value, list):
        return tuple(_from_json_value(None, one) for one in value)
    number = hint is float or (float in get_args(hint) and str not in get_args(hint))
    return float(value) if number and value in ("inf", "-inf", "nan") else value


def matches_type(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of the annotation `kind`; whole numbers are numbers, truths are not."""
    origin, choices = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, typing.NewType):
        return matches_type(value, kind.__supertype__)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in choices)
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, choice) for choice in choices)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = choices[:1] * len(value) if choices[-1] is ... else choices
        return len(kinds) == len(value) and all(map(matches_type, value, kinds))
    if origin in (list, dict):
        return isinstance(value, origin) and (origin is list or all(matches_type(one, choices[1]) for one in value.values()))
    if kind in (None, types.NoneType):
        return value is None
    if kind is float:
        return type(value) in (int, float) and (type(value) is float or abs(value) < 1e300)
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    return type(value) is kind if isinstance(kind, type) else True


def _describe_type(kind: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "fields and values"}
    if get_origin(kind) is tuple:
        own = get_args(kind)
        many = "any number" if own[-1] is ... else str(len(own))
        return f"a list ({many}) of {_describe_type(own[0]).removeprefix('a ')}s"
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe_type, get_args(kind))))
    if get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return "nothing" if kind in (None, types.NoneType) else names.get(kind, getattr(kind, "__name__", str(kind)))


def _describe_value(value: Any) -> str:
    """A value for a message: short, on one line."""
    if isinstance(value, str):
        return repr(visible(value[:60])) + ("..." if len(value) > 60 else "")
    if isinstance(value, list | tuple | dict):
        return f"a list of {len(value)}" if isinstance(value, list | tuple) else f"{len(value)} fields"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number of more than 63 bits"
    return "not a finite number" if isinstance(value, float) and not math.isfinite(value) else repr(value)
