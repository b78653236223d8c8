"""A stranger's words made visible: what would move the cursor, hide text or turn it around is shown as its number."""

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats (bidirectional overrides, zero width), halves, separators


def visible(text: str, lines: bool = False) -> str:
    r"""`text` with every control and formatting character escaped, as \x1b or \u202e; `lines`: line ends and tabs stay.

    What is visible already is left as it is, so a second call changes nothing.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character, lines) for character in text)


def _shown(character: str, lines: bool) -> str:
    if unicodedata.category(character) not in _HIDDEN or (lines and character in "\n\t"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
