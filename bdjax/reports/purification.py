"""A purification as text: a summary for a terminal, and notes that stand in the result and on the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdjax.text import UNMEASURED

_MAX_CLASSES = 10  # named in a note


def summary(result: Mapping[str, Any], out: Path) -> str:
    """Summarise a purification for a terminal: verdicts, accuracies with intervals, changed predictions, files."""
    lines = [""]
    for phase in ("before", "after"):
        accuracy = result["accuracy"][phase]
        interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"
        lines.append(f"{phase:8s}{result['audit'][phase]['verdict']}")
        lines.append(
            f"{'':8s}clean accuracy {100 * accuracy['rate']:.2f} % (95 % interval {interval}), n = {accuracy['n']}"
        )
    changed = result["changed"]
    lines.append(
        f"changed {changed['all']} predictions: {changed['broken']} correct before only, {changed['mended']} correct "
        f"after only, {changed['other']} wrong both times"
    )
    if asr := result["asr"]:
        rates = " -> ".join(f"{100 * asr[phase]:.2f} %" for phase in ("before", "after"))
        lines.append(f"trigger {asr['attack']}, attack success rate {rates}, n = {asr['n']}")
    else:
        lines.append(f"attack success rate: {UNMEASURED}")
    lines += [f"note:   {note}" for note in result["notes"]]
    files = {
        "weights": result["weights"]["file"],
        "model": "purified",
        "evidence": "audit.json",
        "report": "report.html",
    }
    lines += [f"{name + ':':10s}{out / file}" for name, file in files.items() if (out / file).exists()]
    return "\n".join([*lines, f"undo:     the original was not changed: {result['input']['path']}"])


def notes(result: Mapping[str, Any]) -> list[str]:
    """Sentences that a reader must know to judge the numbers: warnings, the estimate, and limits of the evidence."""
    accuracy, after = result["accuracy"], result["audit"]["after"]
    sentences = [f"Warning: {warning}" for warning in result.get("warnings", [])] + _estimate_notes(result)
    if result["rolled_back_to"] is not None:
        returned = f"of round {result['rolled_back_to']:g}" if result["rolled_back_to"] else "that it was given"
        sentences.append(
            f"Accuracy on the validation images fell too far, so the defense returned the model {returned}."
        )
    sentences += [
        "An audit is evidence, not proof, in either direction: of 23 clean and 24 backdoored models with known truth "
        "it accused 7 and 19 (experiments/results/audit). "
        "Nothing here proves that a backdoor is gone; only a test with its trigger could."
    ]
    if not result["audit"]["before"]["poisoned"]:
        sentences.append(
            "The audit did not find a backdoor in the original model. The model was purified nevertheless."
        )
    if after["poisoned"]:
        sentences.append("The audit still suspects the purified model. Try another defense, or more clean images.")
    if accuracy["before"]["high"] < 0.5:
        sentences.append(
            "The original model is wrong on most clean images. Check that its input is prepared as in training "
            "(--input-mean, --input-std, --channels, --layout, --resize) and that the classes are in the same order."
        )
    if accuracy["after"]["high"] < accuracy["before"]["low"]:
        sentences.append("The accuracy fell by more than chance explains: the 95 % intervals do not overlap.")
    counts = zip(result["classes"], result["by_class"], strict=True)
    if missing := [name for name, (_, n_held_out) in counts if n_held_out == 0]:
        sentences.append(
            f"{len(missing)} of {len(result['classes'])} classes have no held-out image: "
            f"{', '.join(missing[:_MAX_CLASSES])}{', …' * (len(missing) > _MAX_CLASSES)}."
        )
    return sentences


def _estimate_notes(result: Mapping[str, Any]) -> list[str]:
    """The trigger-free estimate in words; for each form of trigger its most suspicious goal, a class or any class."""
    if result["estimate"] is None:
        return ["Too few clean images to estimate the remaining attack success rate without the trigger."]
    sentences, names = [], {"additive": "smallest perturbation", "patch": "smallest patch"}
    for form, name in names.items():
        effects = [row for row in result["estimate"]["flips"] if row["form"] == form]
        effect = next((row for row in effects if row["label"] < 0), effects[0])
        target = f"class {result['classes'][effect['label']]}" if effect["label"] >= 0 else "any other class"
        sentences.append(
            f"The {name} towards {target}, recovered from the original model, flips {100 * effect['before']:.0f} % of "
            f"{effect['n']} clean images before purification and {100 * effect['after']:.0f} % after it. Recovered "
            f"again from the purified model, it flips {100 * effect['anew']:.0f} %."
        )
    rate = result["estimate"]["rate"]
    sentences.append(
        f"Estimate of the remaining attack success rate, without the trigger: {100 * rate:.0f} %. It is the largest "
        "rate after purification; a trigger recovered again that is much larger than before counts as 0 %."
    )
    return sentences
