"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """Something the user gave cannot work; the message names it, its value and the remedy (exit code 2)."""
