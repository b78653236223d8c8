"""What a network can be had with beside its width: a model module lists it as `VARIANTS`, option -> allowed values."""

import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bdjax.errors import InputError
from bdjax.protocols import ModelSpec

Variant = tuple[tuple[str, Any], ...]
"""Pairs (option, value) in the order of their names: those that differ from the defaults of `Net`."""


@dataclass(frozen=True)
class Numbers:
    """Tuples of `fewest` to `most` whole numbers, each from 1 to `largest`, and at most `total` together."""

    fewest: int
    most: int
    largest: int
    total: int = sys.maxsize

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, tuple) or not self.fewest <= len(value) <= self.most:
            return False
        return all(type(one) is int and 1 <= one <= self.largest for one in value) and sum(value) <= self.total

    def __str__(self) -> str:
        limit = f", at most {self.total} together" if self.total < sys.maxsize else ""
        return f"{self.fewest} to {self.most} numbers from 1 to {self.largest}{limit}"


def variant(options: Mapping[str, Any]) -> Variant:
    """Options as :func:`bdjax.models.create` takes them; lists, as JSON has them, become tuples.

    Raises InputError for a value that no option has.
    """
    if not isinstance(options, Mapping):
        raise InputError(f"the variant of a model must be options by their names, got {options!r:.80}.")
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(one, int | str):
                raise InputError(f"{name} of a model must be a word, a number or a list of numbers, got {value!r:.80}.")
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in options.items()))


def checked(spec: ModelSpec, chosen: Variant) -> dict[str, Any]:
    """The options as arguments of `spec.Net`. Raises InputError for one that model `name` cannot be had with."""
    name, allowed = spec.name, spec.variants
    for option, value in chosen:
        if option not in allowed:
            known = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            raise InputError(f"model {name!r} cannot be had with {option!r}; {known}.")
        if type(value) is not type(getattr(spec.Net, option)) or value not in allowed[option]:
            raise InputError(f"{option} of model {name!r} must be {_listed(allowed[option])}, got {value!r}.")
    return dict(chosen)


def _listed(allowed: Container[Any]) -> str:
    if isinstance(allowed, range):
        step = f" in steps of {allowed.step}" if allowed.step != 1 else ""
        return f"from {allowed.start} to {allowed[-1]}{step}"
    if isinstance(allowed, Iterable):
        return f"one of {', '.join(map(str, allowed))}"
    return str(allowed)
