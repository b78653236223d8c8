"""Render the HTML templates of this package: every value is escaped, and its control characters are made visible."""

import base64
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from bdjax.io.files import remove_symlink
from bdjax.text import visible

_LARGEST = 224  # pixels of a picture's longer side


def render(template: str, values: dict[str, Any]) -> str:
    """Fill in a template of bdjax/reports/templates.

    Values may come from strangers: markup in them is escaped, and control and formatting characters other than line
    ends and tabs are written as their code points.

    Args:
      template: file name of the template.
      values: its variables by name.

    Returns:
      The HTML document.

    Raises:
      jinja2.UndefinedError: the template uses a variable that `values` lacks.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("bdjax.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: Any) -> Any:
    """The text of a value; the output of macros, whose values went through here already, as it is."""
    return value if isinstance(value, Markup) else visible(str(value), lines=True)


def data_uri(path: Path) -> str:
    """A PNG file as the address of an <img>, so that the page needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture(folder: Path, name: str, image: np.ndarray) -> str:
    """Write an image to FOLDER/pictures/NAME.png, at most 224 pixels wide and high.

    Args:
      folder: folder of the page.
      name: file name without its ending.
      image: [h, w, C], uint8, or floats in [0, 1]; one channel is written as grey, others as RGB.

    Returns:
      Path of the file relative to `folder`.
    """
    from PIL import Image

    stored = image if image.dtype == np.uint8 else np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    drawn = Image.fromarray(stored[..., 0] if stored.shape[-1] == 1 else stored[..., :3])
    drawn.thumbnail((_LARGEST, _LARGEST))
    (folder / "pictures").mkdir(exist_ok=True)
    drawn.save(remove_symlink(folder / "pictures" / f"{name}.png"))
    return f"pictures/{name}.png"
