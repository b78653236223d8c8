"""Triggers side by side, as a table for a terminal and as a picture."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink

_COLUMNS = (  # heading, key, format
    ("PSNR dB", "psnr", "{:.1f}"),
    ("SSIM", "ssim", "{:.3f}"),
    ("l2", "l2", "{:.2f}"),
    ("linf", "linf", "{:.3f}"),
)
_DPI = 100
_CELL = 96  # aim for the side of an enlarged image, in pixels; only whole factors are used
_MAX_SIDE = 256  # of larger images only every k-th pixel is drawn
_MARGIN, _HEAD, _FOOT = 14, 90, 48  # around the rows, in pixels like all below
_GAP, _LINE = 4, 8  # between images, between rows
_NAME, _FACTOR, _NUMBER = 110, 76, 76  # widths of columns; the first is a minimum


def table(result: Mapping[str, Any]) -> str:
    """The numbers as text, a line per attack."""
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
        "Triggered images are compared with clean ones, as stored. l2 and linf are norms of the difference of pixel "
        f"values in [0, 1]. SSIM uses {_window(result)} inside the image, so corners hardly count."
    ]
    notes += [
        f"{_name(row)} does not change {row['unchanged']} of {result['n']} images; its PSNR is that of the others."
        for row in result["rows"]
        if row["unchanged"]
    ]
    return "\n".join([*lines, "", *(textwrap.fill(note, 100) for note in notes)])


def left_out(result: Mapping[str, Any]) -> list[str]:
    """A line for each reason for which attacks are not shown, with their names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in result["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(names)}: {reason.rstrip('.')}." for reason, names in reasons.items()]


def draw(result: Mapping[str, Any], pictures: Sequence[Any], path: Path) -> Path:
    """Write a PNG with a row of clean images, triggered images and differences for each attack.

    Images are enlarged by a whole factor, so that a pixel becomes a square. Differences are drawn around grey, times a
    factor that takes the largest one of the row to black or white; the factor is written beside the row.

    Args:
      result: as `bdjax.pipelines.gallery.gallery` returns it.
      pictures: for each row of the result an object with `clean` and `triggered`, float32 [n, H, W, C] in [0, 1].
      path: file to write.

    Returns:
      `path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    strips = [_strips(pair.clean, pair.triggered) for pair in pictures]
    height, width = strips[0][0][0].shape[:2]
    figure = plt.figure(dpi=_DPI)
    plain: dict[str, Any] = {"va": "center", "parse_math": False}  # for names from the user
    names = [figure.text(0, 0, _name(row), fontsize=11, weight="bold", **plain) for row in result["rows"]]
    origins = [figure.text(0, 0, _origin(row), fontsize=8, color="0.4", **plain) for row in result["rows"]]
    widest = max(_NAME, *(int(text.get_window_extent().width) for text in names + origins))
    starts = [_MARGIN + widest + 4 * _GAP + column * (width + 3 * _GAP) for column in range(3)]
    factors = starts[2] + width + _FACTOR / 2
    numbers = [starts[2] + width + _FACTOR + (column + 1) * _NUMBER for column in range(len(_COLUMNS))]
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
    for x, heading in zip(numbers, ("PSNR, dB", "SSIM", r"$\ell_2$", r"$\ell_\infty$"), strict=True):
        write(x, _HEAD - 18, heading, ha="right")
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
        for x, (_, key, form) in zip(numbers, _COLUMNS, strict=True):
            write(x, middle, _cell(row, key, form), ha="right")
    foot = (
        r"difference: triggered − clean, times the factor, on grey; $\ell_2$, $\ell_\infty$ of it for pixels in [0, 1]",
        f"SSIM uses {_window(result)} inside the image: corners hardly count",
    )
    for line, text in enumerate(foot):
        write(_MARGIN, size[1] - _FOOT + 14 + 18 * line, text, fontsize=9, color="0.4")
    figure.figimage(canvas)
    figure.savefig(remove_symlink(path), dpi=_DPI, pil_kwargs={"optimize": True})
    plt.close(figure)
    return path


def _strips(clean: np.ndarray, triggered: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Clean images, triggered ones and differences as strips [h, w, 3], and the factor of the differences."""
    difference = triggered - clean
    peak = float(np.abs(difference).max())
    factor = _floor(0.5 / peak) if peak else 1.0
    return [_side_by_side(images) for images in (clean, triggered, 0.5 + factor * difference)], factor


def _floor(value: float) -> float:
    """Round down to two digits, so that the factor written is the factor drawn."""
    step = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(f"{np.floor(value / step + 1e-6) * step:.2g}")


def _side_by_side(images: np.ndarray) -> np.ndarray:
    """Enlarge images [n, H, W, C] and place them in a strip [h, w, 3] with white gaps."""
    side = max(images.shape[1:3])
    step, zoom = -(-side // _MAX_SIDE), max(1, round(_CELL / side))
    images = images[:, ::step, ::step].repeat(zoom, 1).repeat(zoom, 2)
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    gap = np.ones((images.shape[1], _GAP, 3), np.float32)
    parts = [part for image in images for part in (gap, image)][1:]
    return np.clip(np.concatenate(parts, 1), 0, 1)


def _name(row: Mapping[str, Any]) -> str:
    """Name of the attack; of one in a file, the file's."""
    return Path(row["attack"]).stem


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    """A number as text; None stands for an infinite one."""
    return "inf" if row[key] is None else form.format(row[key])


def _window(result: Mapping[str, Any]) -> str:
    """The window of SSIM in words."""
    side = result["ssim_window"]
    return "an 11x11 window" if side == 11 else f"a {side}x{side} window (11x11 does not fit)"


def _origin(row: Mapping[str, Any]) -> str:
    """Where the trigger came from, shortened at its beginning to 32 characters."""
    text = row["from"] or ""
    return text if len(text) <= 32 else "…" + text[-31:]
