"""What some results have beside ACC and ASR: CTCA, AGE's score, and a defense's verdict on its victim."""

from collections.abc import Iterable
from typing import Any

import numpy as np

COLUMNS = {"ctca_before": "CTCA before", "ctca_after": "CTCA after", "score": "SCORE"}
_VERDICTS = {"target_named": "target named", "called_poisoned": "called poisoned"}


def read(result: Any) -> dict[str, Any]:
    """Of a result.json: each of COLUMNS in percent or None, and "verdict", (class named, called poisoned, target or -1,
    poisoned) or None."""
    rates = {
        "ctca_before": result["before"].get("ctca"),
        "ctca_after": result["after"].get("ctca"),
        "score": result.get("score"),
    }
    found, verdict = result.get("detection"), None
    if found is not None and found["truth"] is not None:
        targets = found["truth"]["targets"]
        target = int(targets[0]) if len(targets) == 1 else -1
        verdict = int(found["target"]), bool(found["poisoned"]), target, bool(found["truth"]["poisoned"])
    return {**{name: None if rate is None else 100 * float(rate) for name, rate in rates.items()}, "verdict": verdict}


def fields(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation of COLUMNS, and of the verdicts the share of each kind; "" for what is not there."""
    found: dict[str, Any] = {}
    for name in COLUMNS:
        values = [run[name] for run in runs if run[name] is not None]
        found[f"{name}_mean"] = float(np.mean(values)) if values else ""
        found[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else ""
    verdicts = [run["verdict"] for run in runs if run["verdict"]]
    aimed = [(named, target) for named, _, target, _ in verdicts if target >= 0]
    found["target_named"] = float(np.mean([named == target for named, target in aimed])) if aimed else ""
    found["called_poisoned"] = float(np.mean([called for _, called, *_ in verdicts])) if verdicts else ""
    return found


def strings(own: dict[str, Any]) -> dict[str, str]:
    """:func:`fields` for a person."""
    pairs = {name: [f"{v:.2f}" for v in (own[f"{name}_mean"], own[f"{name}_std"]) if v != ""] for name in COLUMNS}
    shares = {name: "" if own[name] == "" else f"{100 * own[name]:.0f} %" for name in _VERDICTS}
    return {name: " ± ".join(values) for name, values in pairs.items()} | shares


def headings(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """Of the columns that some row (:func:`strings`) has a value in."""
    rows = list(rows)
    return {name: text for name, text in (COLUMNS | _VERDICTS).items() if any(row.get(name) for row in rows)}


def one(result: dict[str, Any]) -> list[str]:
    """Lines about a single run for a terminal."""
    before, after, clean = result["before"], result["after"], result.get("clean")
    lines = []
    if before.get("ctca") is not None:
        lines.append(f"{'accuracy of the target, %':26s}{100 * before['ctca']:9.2f}{100 * after['ctca']:9.2f}")
    if clean is not None:
        value = result["score"]
        lines.append(
            f"{'SCORE, %':26s}{'':9s}{'-' if value is None else f'{100 * value:.2f}':>9s}   against a model trained "
            f"without poison: ACC {100 * clean['acc']:.2f}, ASR {100 * clean['asr']:.2f}"
        )
    if result.get("detection"):
        found, truth = result["detection"], result["detection"]["truth"]
        really = "the model is clean"
        if truth is None:
            really = "the truth is not known"
        elif truth["poisoned"]:
            targets = ", ".join(map(str, truth["targets"]))
            really = f"it is poisoned, target {targets}" if targets else "it is poisoned, without a single target"
        lines.append(
            f"verdict: {'poisoned' if found['poisoned'] else 'not poisoned'}, most suspicious class {found['target']} "
            f"(score {found['score']:.2f}); {really}"
        )
    return lines


def note(verdicts: list[tuple[int, bool, int, bool]]) -> str:
    """How often the verdicts were right."""
    import jax.numpy as jnp

    from bdjax.metrics import detection

    named, called, targets, poisoned = (jnp.asarray(np.array(column)) for column in zip(*verdicts, strict=True))
    right = detection(named, called, targets, poisoned)
    counts = int((poisoned & (targets >= 0)).sum()), int(poisoned.sum()), int((~poisoned).sum())
    what = "the target is named in", "poisoned models are called so in", "clean models are spared in"
    shares = [
        f"{text} {100 * float(share):.1f} % of {count}"
        for text, share, count in zip(what, right[:3], counts, strict=True)
        if count
    ]
    return f"Verdicts on the victims: {', '.join(shares)}."
