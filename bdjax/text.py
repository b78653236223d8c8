"""Text in and out: untrusted text made safe to print, and lists in command-line flags. Imports no jax."""

import unicodedata

from bdjax.errors import InputError

UNMEASURED = "not measured: no trigger given"
"""Printed in place of an ASR that no trigger was given for."""

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats (bidirectional overrides, zero width), halves, separators


def visible(text: str, lines: bool = False) -> str:
    r"""Escape every control and formatting character of untrusted text, as \\x1b or \\u202e.

    Escaping twice changes nothing more.

    Args:
      text: from a file or a user.
      lines: keep line ends and tabs.

    Returns:
      The printable text.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character, lines) for character in text)


def parse_names(text: str) -> list[str]:
    """The names in "age, ibau"; an empty list for ""."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_integers(flag: str, text: str, example: str) -> tuple[int, ...]:
    """The integers in a flag's value such as "5,20".

    Args:
      flag: for the message.
      text: the value.
      example: a value that would do, for the message.

    Returns:
      The integers, in order.

    Raises:
      InputError: the value is something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{flag} must be whole numbers with commas between, such as {example}; got {text!r}."
        ) from None


def parse_floats(flag: str, text: str, example: str) -> tuple[float, ...]:
    """The numbers in a flag's value such as "0.5,0.4"; an empty tuple for "".

    Args:
      flag: for the message.
      text: the value.
      example: a value that would do, for the message.

    Returns:
      The numbers, in order.

    Raises:
      InputError: the value is something else.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"{flag} must be numbers with commas between, such as {example}; got {text!r}.") from None


def _shown(character: str, lines: bool) -> str:
    if unicodedata.category(character) not in _HIDDEN or (lines and character in "\n\t"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
