"""A purification for a terminal."""

from pathlib import Path
from typing import Any


def summary(result: dict[str, Any], out: Path) -> str:
    """Verdicts, accuracies with their intervals, what changed, where everything is."""
    lines = [""]
    for phase in ("before", "after"):
        own = result["accuracy"][phase]
        between = f"{100 * own['low']:.1f} to {100 * own['high']:.1f}"
        lines.append(f"{phase:8s}{result['audit'][phase]['verdict']}")
        lines.append(f"{'':8s}clean accuracy {100 * own['rate']:.2f} % ({between}, 95 % interval), n = {own['n']}")
    changed = result["changed"]
    lines.append(
        f"changed {changed['all']} predictions: {changed['broken']} were right, {changed['mended']} are right now, "
        f"{changed['other']} wrong both times"
    )
    if asr := result["asr"]:
        rates = " -> ".join(f"{100 * asr[phase]:.2f} %" for phase in ("before", "after"))
        lines.append(f"trigger {asr['attack']}, attack success rate {rates}, n = {asr['n']}")
    lines += [f"note:   {note}" for note in result["notes"]]
    places = {
        "weights": result["weights"]["file"],
        "model": "purified",
        "evidence": "audit.json",
        "report": "report.html",
    }
    lines += [f"{name + ':':10s}{out / place}" for name, place in places.items() if (out / place).exists()]
    return "\n".join([*lines, f"undo:     the original is untouched: {result['input']['path']}"])
