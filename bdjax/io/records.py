"""Validation of untrusted JSON records: fields and types are checked before a value is used.

`from_plain` builds a Config from a record. `check_manifest` validates the manifest of a model directory: every required
field is present and has its type, every named method is installed, and no text in it causes code to run.
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
"""Largest side of an image in pixels."""
MAX_CLASSES = 100_000
_MAX_CHANNELS = 64
_MAX_WIDTH = 1 << 16  # channels of the first convolution
_Number = int | float
_CONFIG = {"name": str, "config": dict}
_NEEDED: dict[str, Any] = {
    "kind": str, "model": str, "hash": str, "seed": int, "fit": dict | None, "shape": tuple[int, int, int],
    "classes": tuple[str, ...], "attack": _CONFIG | {"": None}, "seconds": {"attack": _Number, "compile": _Number},
    "dataset": {"spec": str, "name": str, "fingerprint": str, "": None},
}  # fmt: skip
_OPTIONAL: dict[str, Any] = {  # checked if present
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
_DAMAGE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@contextmanager
def reading_record(path: Path) -> Iterator[None]:
    """Turn exceptions that a damaged record causes in the block into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE_ERRORS as error:
        reason = visible(f"{type(error).__name__}: {error}")[:200]
        raise InputError(
            f"{path} is damaged or not written by bdjax ({reason}). Remove it and run again, or restore it."
        ) from None


def make_visible(value: Any) -> Any:
    """Escape invisible characters in every text of a JSON value, for tables and pages."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [make_visible(item) for item in value]
    return {visible(name): make_visible(item) for name, item in value.items()} if isinstance(value, dict) else value


def check_manifest(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Validate the manifest of a model directory.

    Class names are escaped for printing, and paths of user-defined methods are resolved among the files that the user
    has named.

    Args:
      manifest: content of the manifest.
      path: its path, for messages.

    Returns:
      The validated manifest.

    Raises:
      InputError: when a field is missing, has another type or is out of range, when a method is not installed, or when
        a text names a code file that the user has not named.
    """
    manifest = dict(manifest)
    try:
        for name, kind in _NEEDED.items():
            if name not in manifest:
                raise InputError(f"{name} is missing")
            _check(name, manifest[name], kind)
        for name, kind in _OPTIONAL.items():
            if name in manifest:
                _check(name, manifest[name], kind)
        _check_values(manifest)
        manifest |= _resolve_names(manifest)
    except InputError as error:
        raise InputError(f"{path} is damaged or not written by bdjax: {visible(str(error))}") from None
    for field, name in (("dataset", "name"), ("source", "file")):
        if (value := manifest.get(field)) is not None:
            manifest[field] = {**value, name: visible(value[name])}
    return manifest | {"classes": [visible(name) for name in manifest["classes"]]}


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise InputError when `value` does not match `kind`: a type annotation, or a dict of fields and their kinds.

    A field "" means that the value may be None; a field "NAME?" is optional.
    """
    if not isinstance(kind, dict):
        if not matches_type(value, kind):
            raise InputError(f"{name} is {_describe_value(value)}, not {_describe_type(kind)}.")
    elif value is not None or "" not in kind:
        if not isinstance(value, dict):
            raise InputError(f"{name} is {_describe_value(value)}, not an object.")
        for field, field_kind in kind.items():
            field_name = field.removesuffix("?")
            if field_name in value and field_name:
                _check(f"{name}.{field_name}", value[field_name], field_kind)
            elif field and field_name == field:
                raise InputError(f"{name}.{field} is missing.")


def _check_values(manifest: dict[str, Any]) -> None:
    """Raise InputError for a value that is out of range, and for fields that its kind of directory lacks."""
    kind, (height, width, channels) = manifest["kind"], manifest["shape"]
    if kind not in KINDS:
        raise InputError(f"kind is {_describe_value(kind)}, not one of {', '.join(KINDS)}.")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and 1 <= channels <= _MAX_CHANNELS):
        raise InputError(
            f"shape is {list(manifest['shape'])}; images have sides of 1 to {MAX_SIDE} pixels and at most "
            f"{_MAX_CHANNELS} channels."
        )
    for field, text in (("hash", manifest["hash"]), ("victim_hash", manifest.get("victim_hash", "0" * 64))):
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise InputError(f"{field} is {_describe_value(text)}, not 64 hexadecimal digits.")
    if not 2 <= (count := len(manifest["classes"])) <= MAX_CLASSES:
        raise InputError(f"classes has {count} entries; it must have 2 to {MAX_CLASSES}.")
    if not 1 <= (manifest.get("width") or 1) <= _MAX_WIDTH:
        raise InputError(f"width is {manifest['width']}; it must be 1 to {_MAX_WIDTH} channels.")
    for field, seed in (("seed", manifest["seed"]), ("defense.seed", (manifest.get("defense") or {}).get("seed", 0))):
        if not 0 <= seed < 1 << 32:
            raise InputError(f"{field} is {_describe_value(seed)}; it must be 0 to {(1 << 32) - 1}.")
    needs = {"imported": ("source",), "purified": ("defense", "split"), "reactivated": ("reactivation",)}
    for name in needs.get(kind, ()):
        if manifest.get(name) is None:
            raise InputError(f"{name} is missing, which a directory of kind {kind} needs.")
    if kind != "imported" and (manifest["attack"] is None or manifest["dataset"] is None):
        raise InputError(f"attack or dataset is missing, which a directory of kind {kind} needs.")


def _resolve_names(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that name methods or code files, with the names resolved by the registry."""
    resolved: dict[str, Any] = {"model": _recorded("model", "models", manifest["model"])}
    for field, kind in (("attack", "attacks"), ("defense", "defenses"), ("reactivation", "attacks")):
        if (method := manifest.get(field)) is not None:
            name = _recorded(f"{field}.name", kind, method["name"])
            config = _resolve_files(f"{field}.config", method["config"])
            resolved[field] = {**method, "name": name, "config": config}
    for field in ("fit", "split", "input"):
        if manifest.get(field) is not None:
            resolved[field] = _resolve_files(field, manifest[field])
    if (dataset := manifest["dataset"]) is not None:
        source, colon, rest = dataset["spec"].partition(":")
        source = _recorded("dataset.spec", "datasets", source)
        resolved["dataset"] = {**dataset, "spec": f"{source}{colon}{rest}"}
    return resolved


def _recorded(field: str, kind: str, name: str) -> str:
    """Resolve the name of a method; add the field to the message when it is unknown."""
    try:
        return registry.recorded(kind, name)
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def _resolve_files(field: str, value: Any, depth: int = 8) -> Any:
    """Resolve code files (a solver or a part) in the values of a Config among the files that the user has named."""
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
        return [_resolve_files(field, item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {name: _resolve_files(f"{field}.{name}", item, depth - 1) for name, item in value.items()}
    return value


def from_plain(kind: type, values: Any, where: str) -> Any:
    """Build an instance of a dataclass from JSON values, and check the type of each value.

    Args:
      kind: the dataclass.
      values: JSON object with values of its fields.
      where: name of the record and the field, for messages.

    Returns:
      The instance.

    Raises:
      InputError: when the class has no such field, a value has another type, or the class rejects a value.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} is {_describe_value(values)}, not an object.")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(str(name) for name in set(values) - {field.name for field in dataclasses.fields(kind)}):
        listed = ", ".join(map(visible, unknown[:5]))
        raise InputError(f"{where} ({kind.__module__}) has no field {listed}; it is of another version.")
    arguments = {name: _from_json_value(hints[name], value) for name, value in values.items()}
    for name, value in arguments.items():
        if not matches_type(value, hints[name]):
            raise InputError(f"{where}: {name} is {_describe_value(value)}, not {_describe_type(hints[name])}.")
    try:
        return kind(**arguments)
    except (TypeError, LookupError, OverflowError) as error:
        raise InputError(f"{where} is not a valid {kind.__module__}.{kind.__name__} ({visible(str(error))}).") from None


def _from_json_value(hint: Any, value: Any) -> Any:
    """Undo the conversion to JSON: lists become tuples, and "inf" or "nan" a float where the field is one."""
    if isinstance(value, list):
        return tuple(_from_json_value(None, item) for item in value)
    number = hint is float or (float in get_args(hint) and str not in get_args(hint))
    return float(value) if number and value in ("inf", "-inf", "nan") else value


def matches_type(value: Any, kind: Any) -> bool:
    """Whether a JSON value matches the annotation `kind`; integers match float, booleans match neither."""
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
        return isinstance(value, origin) and (
            origin is list or all(matches_type(item, choices[1]) for item in value.values())
        )
    if kind in (None, types.NoneType):
        return value is None
    if kind is float:
        return type(value) in (int, float) and (type(value) is float or abs(value) < 1e300)
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    return type(value) is kind if isinstance(kind, type) else True


def _describe_type(kind: Any) -> str:
    """Describe an annotation in words, for messages."""
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        count = "any number" if kinds[-1] is ... else str(len(kinds))
        return f"a list ({count}) of {_describe_type(kinds[0]).removeprefix('a ').removeprefix('an ')}s"
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe_type, get_args(kind))))
    if get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return "null" if kind in (None, types.NoneType) else names.get(kind, getattr(kind, "__name__", str(kind)))


def _describe_value(value: Any) -> str:
    """Describe a value for a message, shortened to one line."""
    if isinstance(value, str):
        return repr(visible(value[:60])) + ("..." if len(value) > 60 else "")
    if isinstance(value, list | tuple | dict):
        return f"a list of {len(value)}" if isinstance(value, list | tuple) else f"an object of {len(value)} fields"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number of more than 63 bits"
    return "not a finite number" if isinstance(value, float) and not math.isfinite(value) else repr(value)
