"""A purification for a terminal, and what a reader must know of it."""

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
    else:
        lines.append("attack success rate: not measured: no trigger given")
    lines += [f"note:   {note}" for note in result["notes"]]
    places = {
        "weights": result["weights"]["file"],
        "model": "purified",
        "evidence": "audit.json",
        "report": "report.html",
    }
    lines += [f"{name + ':':10s}{out / place}" for name, place in places.items() if (out / place).exists()]
    return "\n".join([*lines, f"undo:     the original is untouched: {result['input']['path']}"])


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know before believing any of it."""
    accuracy, after = result["accuracy"], result["audit"]["after"]
    found = [f"Warning: {warning}" for warning in result.get("warnings", [])] + _estimated(result)
    if result["rolled_back_to"] is not None:
        found.append(
            "Accuracy on images that the defense had kept apart fell too far: it gave back "
            + (f"round {result['rolled_back_to']:g}." if result["rolled_back_to"] else "the model as it came in.")
        )
    found += [
        "An audit is a reason to look and, in either direction, no proof: of twenty clean and twenty backdoored digit "
        "models it accused three and thirteen (experiments/results/audit_errors). "
        "Nothing here shows that a backdoor is gone; only its trigger could."
    ]
    if not result["audit"]["before"]["poisoned"]:
        found.append("The audit found no agreed sign of a backdoor before. The model was cleaned all the same.")
    if after["poisoned"]:
        found.append("The audit still accuses the cleaned model. Try another defense, or more clean images.")
    if accuracy["before"]["high"] < 0.5:
        found.append(
            "The model as it came in is wrong on most clean images. Is its input what it was trained on (--input-mean, "
            "--input-std, --channels, --layout, --resize), and are the classes in the same order?"
        )
    if accuracy["after"]["high"] < accuracy["before"]["low"]:
        found.append("The accuracy fell by more than chance explains.")
    if bare := [name for name, (_, n) in zip(result["classes"], result["by_class"], strict=True) if n == 0]:
        found.append(
            f"No image was held out of {len(bare)} of {len(result['classes'])} classes: {', '.join(bare[:10])}."
        )
    return found


def _estimated(result: dict[str, Any]) -> list[str]:
    """The trigger-free estimate in words; of each form of trigger the most suspicious goal, a class or any class."""
    if result["estimate"] is None:
        return ["Too few clean images to estimate, without the trigger, what is left of an attack."]
    found, names = [], {"additive": "smallest perturbation", "patch": "smallest patch"}
    for form, name in names.items():
        of_form = [row for row in result["estimate"]["flips"] if row["form"] == form]
        row = next((row for row in of_form if row["label"] < 0), of_form[0])
        target = f"class {result['classes'][row['label']]}" if row["label"] >= 0 else "any other class"
        found.append(
            f"The {name} towards {target} that was recovered from the model turned "
            f"{100 * row['before']:.0f} % of {row['n']} clean images before and turns {100 * row['after']:.0f} % now; "
            f"recovered anew, {100 * row['anew']:.0f} %."
        )
    rate = result["estimate"]["rate"]
    found.append(f"Estimate of the attack success rate that is left, without knowing the trigger: {100 * rate:.0f} %.")
    return found
