"""What a weight file holds beside the weights, as lines for a terminal."""

from collections.abc import Mapping
from typing import Any

_MAX_NAMES = 10


def notes(manifest: Mapping[str, Any]) -> list[str]:
    """Say, a line each, what was found beside the weights and what was done with it."""
    source: Mapping[str, Any] = manifest["source"]
    lines: list[str] = []
    if source.get("classes"):
        lines.append(f"classes: {_shortened(manifest['classes'])}, from {source['classes']!r} in the file")
    if source.get("unnamed"):
        lines.append(f"classes: numbered; the names in the file are not used, {source['unnamed']}")
    if source.get("normalised"):
        lines.append(f"normalisation layer: {_shortened(source['normalised'])}, applied to images as said above")
    if source.get("ignored"):
        lines.append(
            f"ignored: {_shortened(source['ignored'])}; what the original network computes with them is left out"
        )
    if source.get("accuracy"):
        lines.append(f"accuracy recorded in the file: {source['accuracy']:.4f}")
    if source.get("skipped"):
        objects = [f"{ascii(key)[1:-1]} ({ascii(type_name)[1:-1]})" for key, type_name in source["skipped"].items()]
        lines.append(f"skipped: objects that are no tensors, which were not built: {_shortened(objects)}")
    return lines


def _shortened(values: list[Any]) -> str:
    """The first values with commas between them, and how many more there are."""
    more = f" and {len(values) - _MAX_NAMES} more" if len(values) > _MAX_NAMES else ""
    return ", ".join(map(str, values[:_MAX_NAMES])) + more
