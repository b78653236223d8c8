"""What was found in a weight file beside the weights, for a terminal."""

from collections.abc import Mapping
from typing import Any

_SHOWN = 10


def notes(manifest: Mapping[str, Any]) -> list[str]:
    """What was found beside the weights and what became of it, a line each."""
    source: Mapping[str, Any] = manifest["source"]
    found: list[str] = []
    if source.get("classes"):
        found.append(f"classes: {_some(manifest['classes'])}, in the file under {source['classes']!r}")
    if source.get("unnamed"):
        found.append(f"classes: numbered; the names in the file are not used, {source['unnamed']}")
    if source.get("normalised"):
        found.append(f"normalisation layer: {_some(source['normalised'])}, done to images as said above")
    if source.get("ignored"):
        found.append(f"ignored: {_some(source['ignored'])}; what the owner's network does with them is not done here")
    if source.get("accuracy"):
        found.append(f"accuracy that the file tells: {source['accuracy']:.4f}")
    if source.get("skipped"):
        held = [f"{ascii(place)[1:-1]} ({ascii(name)[1:-1]})" for place, name in source["skipped"].items()]
        found.append(f"skipped, for it is no tensor, and not built: {_some(held)}")
    return found


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:_SHOWN])) + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
