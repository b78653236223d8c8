"""Range checks for the numeric fields of attack Configs, with uniform error messages."""

import math
from typing import Any

from bdjax.errors import InputError


def check_positive(config: Any, **defaults: float) -> None:
    """Raise InputError for a field that is not positive and finite; the given value is the one the message suggests."""
    for name, value in defaults.items():
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"attack.{name} must be positive and finite, got {getattr(config, name)}. Use {value:g}.")


def check_least(config: Any, **minima: float) -> None:
    """Raise InputError for a field that is below its minimum, or not finite."""
    for name, value in minima.items():
        if not value <= getattr(config, name) < math.inf:
            raise InputError(f"attack.{name} must be finite and at least {value}, got {getattr(config, name)}.")


def check_range(config: Any, high: float, **defaults: float) -> None:
    """Check that fields of a Config are in (0, high].

    Args:
      config: the Config.
      high: largest allowed value of every field.
      **defaults: the value that the message suggests for each field.

    Raises:
      InputError: when a field is out of range.
    """
    for name, value in defaults.items():
        if not 0 < getattr(config, name) <= high:
            raise InputError(f"attack.{name} must be in (0, {high:g}], got {getattr(config, name)}. Use {value:g}.")
