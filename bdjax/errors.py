"""The exception for invalid user input, and a range check for the fields of a Config."""

from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Invalid user input. The message states the name, the value and the remedy; the command exits with code 2."""


def check_fields(config: Any, part: str, *rules: tuple[tuple[str, ...], str, Callable[[Any], bool]]) -> None:
    """Raise InputError for the first field of a Config that violates a rule.

    Args:
      config: a Config dataclass.
      part: prefix of its command-line flags, "attack" or "defense", for the message.
      *rules: triples (field names, requirement in words, predicate that a valid value satisfies).

    Raises:
      InputError: when a field violates its rule.
    """
    for names, requirement, is_valid in rules:
        for name in names:
            if not is_valid(getattr(config, name)):
                raise InputError(f"{part}.{name} must be {requirement}, got {getattr(config, name)!r}.")
