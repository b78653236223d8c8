"""The reporter of a purification: its sentences, pictures and page (:class:`bdjax.pipelines.purification.Reporter`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.pipelines.results import AuditResult, PurifyResult
from bdjax.reports import _html, audit, imported, purification
from bdjax.reports import page as html_page


def import_notes(manifest: Mapping[str, Any]) -> list[str]:
    """Sentences on how a weight file was read."""
    return imported.notes(manifest)


def verdict(result: AuditResult) -> str:
    """The verdict of an audit as a sentence."""
    return audit.verdict(result)


def audit_pictures(
    result: AuditResult, arrays: Mapping[str, np.ndarray], folder: Path, name: str
) -> list[dict[str, str]]:
    """Write the figure of an audit and a picture of each recovered trigger.

    Args:
      result: of the audit.
      arrays: that the detectors reported, as "DETECTOR/NAME".
      folder: of the purification; gets NAME.png and pictures/NAME-DETECTOR-NUMBER.png.
      name: of the figure.

    Returns:
      File, detector and title of each picture.
    """
    audit.draw(result, arrays, folder / f"{name}.png")
    return [
        {"file": picture(folder, f"{name}-{detector}-{number}", image), "method": detector, "title": title}
        for detector, images, titles in audit.recovered_images(result, arrays)[1:]
        for number, (image, title) in enumerate(zip(images, titles, strict=True))
    ]


def picture(folder: Path, name: str, image: np.ndarray) -> str:
    """Write an image to FOLDER/pictures/NAME.png.

    Args:
      folder: of the purification.
      name: file name without its ending.
      image: [h, w, C], uint8, or floats in [0, 1].

    Returns:
      Path of the file relative to `folder`.
    """
    return _html.picture(folder, name, image)


def notes(result: PurifyResult) -> list[str]:
    """Sentences that a reader must know before believing the result."""
    return purification.notes(result)


def page(result: PurifyResult, folder: Path) -> None:
    """Write report.html."""
    html_page.write(result, folder)
