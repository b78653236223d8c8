"""Escape untrusted text for printing, and parse lists in command-line flags. Does not import jax."""

import unicodedata

from bdjax.errors import InputError

UNMEASURED = "not measured: no trigger given"
"""Printed in place of an attack success rate when no trigger was given."""

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats (bidirectional, zero width), surrogates, separators


def visible(text: str, lines: bool = False) -> str:
    r"""Escape every control and formatting character of untrusted text, as \\x1b or \\u202e.

    Escaping is idempotent.

    Args:
      text: untrusted text, for example from a file.
      lines: whether to keep newlines and tabs.

    Returns:
      The printable text.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(character, lines) for character in text)


def parse_names(text: str) -> list[str]:
    """Split a comma-separated list of names such as "age, ibau"; "" gives an empty list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_integers(flag: str, text: str, example: str) -> tuple[int, ...]:
    """Parse a comma-separated list of integers such as "5,20".

    Args:
      flag: name of the command-line flag, for the message.
      text: value of the flag.
      example: a valid value, for the message.

    Returns:
      The integers in order.

    Raises:
      InputError: when the value is not such a list.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{flag} must be whole numbers with commas between, such as {example}; got {text!r}."
        ) from None


def parse_floats(flag: str, text: str, example: str) -> tuple[float, ...]:
    """Parse a comma-separated list of numbers such as "0.5,0.4"; "" gives an empty tuple.

    Args:
      flag: name of the command-line flag, for the message.
      text: value of the flag.
      example: a valid value, for the message.

    Returns:
      The numbers in order.

    Raises:
      InputError: when the value is not such a list.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"{flag} must be numbers with commas between, such as {example}; got {text!r}.") from None


def _escape(character: str, lines: bool) -> str:
    """Return the character, or its escape sequence when it is invisible."""
    if unicodedata.category(character) not in _HIDDEN or (lines and character in "\n\t"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
