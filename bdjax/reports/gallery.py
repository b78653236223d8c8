"""Triggers side by side, as a table for a terminal and as a picture."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink

_COLUMNS = (
    ("PSNR dB", "psnr", "{:.1f}"),
    ("SSIM", "ssim", "{:.3f}"),
    ("l2", "l2", "{:.2f}"),
    ("linf", "linf", "{:.3f}"),
)
_DPI = 100
_CELL = 96  # pixels of the picture that an image shall take, as near as whole multiples come
_LARGEST = 256  # larger images are thinned out
_MARGIN, _HEAD, _FOOT = 14, 90, 48  # around the rows
_GAP, _LINE = 4, 8  # between images, between rows
_NAME, _FACTOR, _NUMBER = 110, 76, 76  # widths of columns, the first at least


def table(result: dict[str, Any]) -> str:
    """The numbers as text, a line an attack."""
    width = max(len(_name(row)) for row in result["rows"]) + 2
    lines = [
        f"Triggers on {result['dataset']}, seed {result['seed']}: means over n = {result['n']} test images",
        "",
        f"{'attack':{width}s}" + "".join(f"{heading:>9s}" for heading, *_ in _COLUMNS) + "  trigger from",
    ]
    for row in result["rows"]:
        numbers = "".join(f"{_cell(row, key, form):>9s}" for _, key, form in _COLUMNS)
        lines.append(f"{_name(row):{width}s}{numbers}  {row['from'] or 'the default Config'}")
    notes = [
        "Triggered against clean images, as stored. l2 and linf are norms of the difference in pixel values, [0, 1]. "
        f"SSIM has {_window(result)} that stays inside the image, so it hardly sees the corners."
    ]
    notes += [
        f"{_name(row)} leaves {row['unchanged']} of {result['n']} images as they are; its PSNR is of the others."
        for row in result["rows"]
        if row["unchanged"]
    ]
    return "\n".join([*lines, "", *(textwrap.fill(note, 100) for note in notes)])


def left_out(result: dict[str, Any]) -> list[str]:
    """A line for each reason why attacks are not shown, with their names."""
    reasons: dict[str, list[str]] = {}
    for name, why in result["left_out"].items():
        reasons.setdefault(why, []).append(name)
    return [f"left out: {', '.join(names)}: {why.rstrip('.')}." for why, names in reasons.items()]


def draw(result: dict[str, Any], pictures: list[Any], path: Path) -> Path:
    """Write a PNG with a row for each of `pictures` (`clean`, `triggered`: float32 [n, H, W, C] in [0, 1]).

    Images are enlarged by whole numbers, a pixel staying a square. The difference is drawn around grey, times a factor
    that takes the largest of the row to black or white and is written beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    strips = [_strips(pair.clean, pair.triggered) for pair in pictures]
    height, width = strips[0][0][0].shape[:2]
    figure = plt.figure(dpi=_DPI)
    plain: dict[str, Any] = {"va": "center", "parse_math": False}  # for what the user named
    names = [figure.text(0, 0, _name(row), fontsize=11, weight="bold", **plain) for row in result["rows"]]
    origins = [figure.text(0, 0, _origin(row), fontsize=8, color="0.4", **plain) for row in result["rows"]]
    widest = max(_NAME, *(int(text.get_window_extent().width) for text in names + origins))
    starts = [_MARGIN + widest + 4 * _GAP + place * (width + 3 * _GAP) for place in range(3)]
    factors = starts[2] + width + _FACTOR / 2
    numbers = [starts[2] + width + _FACTOR + (place + 1) * _NUMBER for place in range(len(_COLUMNS))]
    size = (numbers[-1] + _MARGIN, _HEAD + len(strips) * (height + _LINE) + _FOOT)
    figure.set_size_inches(size[0] / _DPI, size[1] / _DPI)
    canvas = np.ones((size[1], size[0], 3), np.float32)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / size[0], 1 - y / size[1], text, **{"fontsize": 11, "va": "center", **style})

    write(_MARGIN, 20, f"Triggers on {result['dataset']}", fontsize=14, weight="bold", parse_math=False)
    write(_MARGIN, 43, f"means over {result['n']} test images, seed {result['seed']}", color="0.4")
    for start, heading in zip(starts, ("clean", "triggered", "difference"), strict=True):
        write(start + width / 2, _HEAD - 18, heading, ha="center")
    write(factors, _HEAD - 18, "times", ha="center", color="0.4")
    for place, heading in zip(numbers, ("PSNR, dB", "SSIM", r"$\ell_2$", r"$\ell_\infty$"), strict=True):
        write(place, _HEAD - 18, heading, ha="right")
    for number, (row, (images, factor)) in enumerate(zip(result["rows"], strips, strict=True)):
        top = _HEAD + number * (height + _LINE)
        middle = top + height / 2
        canvas[top - _LINE // 2, _MARGIN : size[0] - _MARGIN] = 0.85
        for start, image in zip(starts, images, strict=True):
            canvas[top : top + height, start : start + width] = image
        shift = 9 if row["from"] else 0
        names[number].set_position((_MARGIN / size[0], 1 - (middle - shift) / size[1]))
        origins[number].set_position((_MARGIN / size[0], 1 - (middle + shift) / size[1]))
        write(factors, middle, f"×{factor:g}", ha="center", color="0.4")
        for place, (_, key, form) in zip(numbers, _COLUMNS, strict=True):
            write(place, middle, _cell(row, key, form), ha="right")
    foot = (
        r"difference: triggered − clean, times the factor, on grey; $\ell_2$, $\ell_\infty$ of it for pixels in [0, 1]",
        f"SSIM has {_window(result)} that stays inside the image: it hardly sees the corners",
    )
    for line, text in enumerate(foot):
        write(_MARGIN, size[1] - _FOOT + 14 + 18 * line, text, fontsize=9, color="0.4")
    figure.figimage(canvas)
    figure.savefig(remove_symlink(path), dpi=_DPI, pil_kwargs={"optimize": True})
    plt.close(figure)
    return path


def _strips(clean: np.ndarray, triggered: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Clean, triggered and difference, [h, w, 3] each with all its images side by side, and the difference's factor."""
    difference = triggered - clean
    peak = float(np.abs(difference).max())
    factor = _floor(0.5 / peak) if peak else 1.0
    return [_side_by_side(images) for images in (clean, triggered, 0.5 + factor * difference)], factor


def _floor(value: float) -> float:
    """Rounded down to two digits, so that the factor written is the factor drawn."""
    step = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(f"{np.floor(value / step + 1e-6) * step:.2g}")


def _side_by_side(images: np.ndarray) -> np.ndarray:
    side = max(images.shape[1:3])
    thin, zoom = -(-side // _LARGEST), max(1, round(_CELL / side))
    images = images[:, ::thin, ::thin].repeat(zoom, 1).repeat(zoom, 2)
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    gap = np.ones((images.shape[1], _GAP, 3), np.float32)
    parts = [part for image in images for part in (gap, image)][1:]
    return np.clip(np.concatenate(parts, 1), 0, 1)


def _name(row: dict[str, Any]) -> str:
    return Path(row["attack"]).stem


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    return "inf" if row[key] is None else form.format(row[key])


def _window(result: dict[str, Any]) -> str:
    side = result["ssim_window"]
    return "an 11x11 window" if side == 11 else f"a {side}x{side} window (11x11 does not fit)"


def _origin(row: dict[str, Any]) -> str:
    text = row["from"] or ""
    return text if len(text) <= 32 else "…" + text[-31:]
