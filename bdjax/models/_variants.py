"""Options of a network other than its width, which a model module lists as `VARIANTS`: option -> allowed values."""

import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bdjax.errors import InputError
from bdjax.protocols import ModelSpec

Variant = tuple[tuple[str, Any], ...]
"""Pairs (option, value), sorted by name, of the options that differ from the defaults of `Net`."""


@dataclass(frozen=True)
class Numbers:
    """Set of the tuples of `fewest` to `most` integers, each from 1 to `largest`, with a sum of at most `total`."""

    fewest: int
    most: int
    largest: int
    total: int = sys.maxsize

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, tuple) or not self.fewest <= len(value) <= self.most:
            return False
        return all(type(n) is int and 1 <= n <= self.largest for n in value) and sum(value) <= self.total

    def __str__(self) -> str:
        limit = f", at most {self.total} together" if self.total < sys.maxsize else ""
        return f"{self.fewest} to {self.most} numbers from 1 to {self.largest}{limit}"


def variant(options: Mapping[str, Any]) -> Variant:
    """Convert options to the form that :func:`bdjax.models.create` expects, with tuples in place of JSON's lists.

    Raises InputError for a value whose type no option has.
    """
    if not isinstance(options, Mapping):
        raise InputError(f"the variant of a model must be options by their names, got {options!r:.80}.")
    for name, value in options.items():
        for item in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(item, int | str):
                raise InputError(f"{name} of a model must be a word, a number or a list of numbers, got {value!r:.80}.")
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in options.items()))


def checked(spec: ModelSpec, chosen: Variant) -> dict[str, Any]:
    """Return the options as arguments of `spec.Net`. Raises InputError for options or values that it does not have."""
    name, allowed = spec.name, spec.variants
    for option, value in chosen:
        if option not in allowed:
            known = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            raise InputError(f"model {name!r} has no option {option!r}; {known}.")
        if type(value) is not type(getattr(spec.Net, option)) or value not in allowed[option]:
            raise InputError(f"{option} of model {name!r} must be {_describe(allowed[option])}, got {value!r}.")
    return dict(chosen)


def _describe(allowed: Container[Any]) -> str:
    """Describe the allowed values, for a message."""
    if isinstance(allowed, range):
        step = f" in steps of {allowed.step}" if allowed.step != 1 else ""
        return f"from {allowed.start} to {allowed[-1]}{step}"
    if isinstance(allowed, Iterable):
        return f"one of {', '.join(map(str, allowed))}"
    return str(allowed)
