"""Checks of a Config's numbers: the same words for the same mistake."""

import math
from typing import Any

from bdjax.errors import InputError


def check_positive(config: Any, **usual: float) -> None:
    """Raise InputError when one of the fields is not positive and finite; the values are what the message advises."""
    for name, value in usual.items():
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"attack.{name} must be positive and finite, got {getattr(config, name)}. Use {value:g}.")


def check_least(config: Any, **least: float) -> None:
    """Raise InputError when one of the fields is below its value here, or not finite."""
    for name, value in least.items():
        if not value <= getattr(config, name) < math.inf:
            raise InputError(f"attack.{name} must be finite and at least {value}, got {getattr(config, name)}.")


def check_range(config: Any, high: float, **usual: float) -> None:
    """Raise InputError when one of the fields is not in (0, high]; the values are what the message advises."""
    for name, value in usual.items():
        if not 0 < getattr(config, name) <= high:
            raise InputError(f"attack.{name} must be in (0, {high:g}], got {getattr(config, name)}. Use {value:g}.")
