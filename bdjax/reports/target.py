"""Results beside ACC and ASR: CTCA, AGE's score, and a defense's verdict on its victim."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

COLUMNS = {"ctca_before": "CTCA before", "ctca_after": "CTCA after", "score": "SCORE"}
"""Headings of the rates by column."""
_VERDICTS = {"target_named": "target named", "called_poisoned": "called poisoned"}


def read(result: Mapping[str, Any]) -> dict[str, Any]:
    """Extract these results from a result.json.

    Returns:
      `COLUMNS` in percent or None, and "verdict": (predicted target, predicted poisoned, true target or -1, truly
      poisoned), or None without a verdict or without the truth.
    """
    rates = {
        "ctca_before": result["before"].get("ctca"),
        "ctca_after": result["after"].get("ctca"),
        "score": result.get("score"),
    }
    detection, verdict = result.get("detection"), None
    if detection is not None and detection["truth"] is not None:
        targets = detection["truth"]["targets"]
        target = int(targets[0]) if len(targets) == 1 else -1
        verdict = int(detection["target"]), bool(detection["poisoned"]), target, bool(detection["truth"]["poisoned"])
    return {**{name: None if rate is None else 100 * float(rate) for name, rate in rates.items()}, "verdict": verdict}


def fields(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of `COLUMNS`, and the shares of right verdicts; "" where there is none."""
    statistics: dict[str, Any] = {}
    for name in COLUMNS:
        values = [run[name] for run in runs if run[name] is not None]
        statistics[f"{name}_mean"] = float(np.mean(values)) if values else ""
        statistics[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else ""
    verdicts = [run["verdict"] for run in runs if run["verdict"]]
    targets = [(predicted, target) for predicted, _, target, _ in verdicts if target >= 0]
    named = float(np.mean([predicted == target for predicted, target in targets])) if targets else ""
    poisoned = float(np.mean([predicted for _, predicted, *_ in verdicts])) if verdicts else ""
    return statistics | {"target_named": named, "called_poisoned": poisoned}


def strings(statistics: Mapping[str, Any]) -> dict[str, str]:
    """The statistics of :func:`fields` as text."""
    pairs = {
        name: [f"{v:.2f}" for v in (statistics[f"{name}_mean"], statistics[f"{name}_std"]) if v != ""]
        for name in COLUMNS
    }
    shares = {name: "" if statistics[name] == "" else f"{100 * statistics[name]:.0f} %" for name in _VERDICTS}
    return {name: " ± ".join(values) for name, values in pairs.items()} | shares


def headings(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """Headings of the columns in which some row of :func:`strings` has a value."""
    rows = list(rows)
    return {name: text for name, text in (COLUMNS | _VERDICTS).items() if any(row.get(name) for row in rows)}


def run_lines(result: Mapping[str, Any]) -> list[str]:
    """These results of a single run as lines for a terminal."""
    before, after, clean = result["before"], result["after"], result.get("clean")
    lines = []
    if before.get("ctca") is not None:
        lines.append(f"{'accuracy of the target, %':26s}{100 * before['ctca']:9.2f}{100 * after['ctca']:9.2f}")
    if clean is not None:
        score = result["score"]
        lines.append(
            f"{'SCORE, %':26s}{'':9s}{'-' if score is None else f'{100 * score:.2f}':>9s}   against a model trained "
            f"without poison: ACC {100 * clean['acc']:.2f}, ASR {100 * clean['asr']:.2f}"
        )
    if result.get("detection"):
        detection, truth = result["detection"], result["detection"]["truth"]
        answer = "the model is clean"
        if truth is None:
            answer = "not known"
        elif truth["poisoned"]:
            targets = ", ".join(map(str, truth["targets"]))
            answer = f"it is poisoned, target {targets}" if targets else "it is poisoned, without a single target"
        lines.append(
            f"verdict: {'poisoned' if detection['poisoned'] else 'not poisoned'}, most suspicious class "
            f"{detection['target']} (score {detection['score']:.2f}); truth: {answer}"
        )
    return lines


def note(verdicts: list[tuple[int, bool, int, bool]]) -> str:
    """How often the verdicts of :func:`read` are right, as a sentence."""
    import jax.numpy as jnp

    from bdjax.metrics import detection

    named, called, targets, poisoned = (jnp.asarray(np.array(column)) for column in zip(*verdicts, strict=True))
    rates = detection(named, called, targets, poisoned)
    counts = int((poisoned & (targets >= 0)).sum()), int(poisoned.sum()), int((~poisoned).sum())
    events = "the target is named in", "poisoned models are called poisoned in", "clean models are called clean in"
    shares = [
        f"{event} {100 * float(rate):.1f} % of {count}"
        for event, rate, count in zip(events, rates[:3], counts, strict=True)
        if count
    ]
    return f"Verdicts on the victims: {', '.join(shares)}."
