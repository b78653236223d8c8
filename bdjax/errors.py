"""The one exception for mistakes a user can mend, and the check of a Config's numbers that raises it."""

from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot work; the message names it, its value and the remedy (exit code 2)."""


def check_fields(config: Any, part: str, *rules: tuple[tuple[str, ...], str, Callable[[Any], bool]]) -> None:
    """Raise InputError for the first field that breaks a rule: (names of fields, what they must be, whether one is).

    Args: part: how the flags of this Config begin, "attack" or "defense".
    """
    for names, what, holds in rules:
        for name in names:
            if not holds(getattr(config, name)):
                raise InputError(f"{part}.{name} must be {what}, got {getattr(config, name)!r}.")
