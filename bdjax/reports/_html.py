"""HTML by elements, each of which escapes what it is given; pictures inside it."""

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink
from bdjax.text import visible

_LARGEST = 224  # pixels of a picture's longer side


class Safe(str):
    """HTML that is escaped already."""

    __slots__ = ()


def el(tag: str, *children: Any, **attributes: Any) -> Safe:
    """An element; children that are not :class:`Safe` and all attributes are escaped, attributes of None left out."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    opened = "".join(f' {name}="{_escaped(value)}"' for name, value in names.items())
    inner = "".join(child if isinstance(child, Safe) else _escaped(child) for child in children)
    return Safe(f"<{tag}{opened}>" if tag == "img" else f"<{tag}{opened}>{inner}</{tag}>")


def _escaped(value: Any) -> str:
    """Neither an element of HTML nor what would turn the text around it."""
    return html.escape(visible(str(value), lines=True))


def facts(rows: list[tuple[str, Any]]) -> Safe:
    """Names and what they stand for."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in rows))


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]], caption: str) -> Safe:
    """Rows whose first cell names them. The caption is for those who do not see it."""
    top = el("tr", *(el("th", head, scope="col") if head else el("td") for head in heads))
    lines = [el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest)) for first, *rest in rows]
    drawn = el("table", el("caption", caption), el("thead", top), el("tbody", *lines))
    return el("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=caption)


def gallery(folder: Path, pictures: list[tuple[str, str, str]]) -> Safe:
    """(file below the folder, alternative text, caption) of each; the files go into the page."""
    figures = []
    for file, alternative, caption in pictures:
        data = base64.b64encode((folder / file).read_bytes()).decode()
        image = el("img", src=f"data:image/png;base64,{data}", alt=alternative)
        figures.append(el("figure", image, el("figcaption", caption)))
    return el("div", *figures, class_="gallery")


def code(text: str) -> Safe:
    """A command or a path, as it is typed."""
    return el("pre", el("code", text), tabindex="0")


def picture(folder: Path, name: str, image: np.ndarray) -> str:
    """Write an image (uint8, or floats in [0, 1], [h, w, C]) to FOLDER/pictures/NAME.png; its path below the folder."""
    from PIL import Image

    stored = image if image.dtype == np.uint8 else np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    drawn = Image.fromarray(stored[..., 0] if stored.shape[-1] == 1 else stored[..., :3])
    drawn.thumbnail((_LARGEST, _LARGEST))
    (folder / "pictures").mkdir(exist_ok=True)
    drawn.save(remove_symlink(folder / "pictures" / f"{name}.png"))
    return f"pictures/{name}.png"
