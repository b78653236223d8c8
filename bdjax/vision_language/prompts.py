"""Captions of a class: templates with {} in place of its name."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdjax.errors import InputError
from bdjax.io.files import MAX_TEXT, read_bytes

_OF_CIFAR = (
    "a photo of {} {{}}.", "a blurry photo of {} {{}}.", "a black and white photo of {} {{}}.",
    "a low contrast photo of {} {{}}.", "a high contrast photo of {} {{}}.", "a bad photo of {} {{}}.",
    "a good photo of {} {{}}.", "a photo of {} small {{}}.", "a photo of {} big {{}}.",
)  # fmt: skip
CIFAR = tuple(template.format(article) for article in ("a", "the") for template in _OF_CIFAR)
"""The 18 templates that CLIP's authors published for CIFAR-10 and CIFAR-100."""


def templates(name: str) -> tuple[str, ...]:
    """Return templates by name: "cifar", "plain" (one template), or a text file with a template on each line.

    Raises InputError for a template without {}.
    """
    if name == "cifar":
        return CIFAR
    if name == "plain":
        return ("a photo of a {}.",)
    try:
        text = read_bytes(Path(name), MAX_TEXT, "a list of templates").decode()
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text. Give a file with a template on each line.") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    wrong = next((line for line in lines if line.count("{}") != 1), None)
    if wrong is not None or not lines:
        raise InputError(f"{name}: {wrong or 'no line'!r} is no template. Write {{}} once, where the class name goes.")
    return lines


def fill(template: str, name: str) -> str:
    """Return the caption of a class."""
    return template.replace("{}", name.replace("_", " "))


def random_captions(
    names: Sequence[str], labels: np.ndarray, chosen: Sequence[str], generator: np.random.Generator
) -> tuple[str, ...]:
    """Give every label a caption by a random template.

    Args:
      names: names of the classes.
      labels: int32 [N].
      chosen: templates.
      generator: draws the templates.

    Returns:
      N captions.
    """
    draws = generator.integers(0, len(chosen), len(labels))
    return tuple(fill(chosen[draw], names[label]) for draw, label in zip(draws, labels, strict=True))
