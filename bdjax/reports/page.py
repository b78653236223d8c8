"""The report of a purification: one self-contained HTML file, which loads nothing and has no scripts.

The sentences and the structure are in templates/purification.html; this module prepares the values.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bdjax.io import checkpoint
from bdjax.reports._html import data_uri, render
from bdjax.reports.audit import class_label, p_value_in_words
from bdjax.text import UNMEASURED, visible

_ORDINALS = {2: "2nd", 3: "3rd", 4: "4th", 5: "5th"}  # classes listed for each method beside the most suspicious one
_SORTS = {
    "broken": "correct before, wrong after",
    "mended": "wrong before, correct after",
    "other": "wrong before and after, in different ways",
}
_PHASES = ("before", "after")


class _Fact(NamedTuple):
    """A row of a list of facts."""

    name: str
    value: Any
    code: bool = False  # set in a monospaced font


class _Picture(NamedTuple):
    """A picture of a gallery."""

    source: str
    alternative: str
    caption: str


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write the report to FOLDER/report.html.

    Args:
      result: as `bdjax.pipelines.purification.purify` returns it.
      folder: holds the pictures that `result` names; they are copied into the page.

    Returns:
      Path of the report.
    """
    values = {
        "title": f"{visible(Path(result['input']['path']).name)}: audited and purified",
        "summary": _summary(result),
        "input": _input(result),
        "audit": _audit(result, folder),
        "accuracy": _accuracy(result),
        "changed": _changed(result, folder),
        "done": _done(result),
        "undo": _undo(result),
        "data": result["data"]["spec"],
        "seed": result["seed"],
        "n_clean": result["n_defender"] + result["n_held_out"],
        "n_defender": result["n_defender"],
        "n_held_out": result["n_held_out"],
        "version": result["env"]["bdjax"],
        "date": result["env"]["date"],
    }
    checkpoint.write_text(folder / "report.html", render("purification.html", values))
    return folder / "report.html"


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Both verdicts, the accuracies, and the notes."""
    verdicts = []
    for phase, heading in (("before", "Audit of the original model"), ("after", "Audit of the purified model")):
        audit = result["audit"][phase]
        kind = "bad" if audit["poisoned"] else "plain"
        verdicts.append({"heading": heading, "kind": kind, "sentence": f"{_capitalise(audit['verdict'])}."})
    rates = " → ".join(f"{100 * result['accuracy'][phase]['rate']:.1f}\u00a0%" for phase in _PHASES)
    return {"verdicts": verdicts, "rates": rates, "notes": result["notes"]}


def _input(result: Mapping[str, Any]) -> dict[str, Any]:
    """Facts on the model as it came in, and the tensors of a weight file."""
    incoming, model = result["input"], result["model"]
    source, is_file = model["source"], incoming["kind"] == "file"
    steps = {name: value for name, value in (model["input"] or {}).items() if value}
    facts = [
        _Fact("file" if is_file else f"directory ({incoming['kind']})", incoming["path"], code=True),
        _Fact("sha256" if is_file else "hash in its manifest", incoming["sha256"], code=True),
        _Fact("architecture", model["model"]),
        _Fact("images", " × ".join(map(str, model["shape"])) + " (height, width, channels)"),
        _Fact("preprocessing", ", ".join(f"{k} {v}" for k, v in steps.items()) or "none: pixel values in [0, 1]"),
        _Fact("classes", f"{len(result['classes'])}: {_shortened(result['classes'], 20)}"),
    ]
    tensors: list[tuple[str, str, str]] = []
    if source:
        key = f", in the entry {source['key']!r}" if source["key"] else ""
        facts.append(_Fact("format", f"{source['format']}, {len(source['tensors'])} tensors{key}"))
        facts.append(_Fact("tensor names", f"as in {source['names']}"))
        tensors = [(name, dtype, " × ".join(map(str, shape)) or "scalar") for name, dtype, shape in source["tensors"]]
    return {"facts": facts, "tensors": tensors, "n_tensors": len(tensors)}


def _audit(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The evidence of every method."""
    before = result["audit"]["before"]
    methods = [_evidence(result, method, folder) for method in before["methods"]]
    return {
        "methods": methods,
        "n_methods": len(methods),
        "n": before["n"],
        "truth": before["truth"],
        "level": before.get("level", 0.05),
    }


def _evidence(result: Mapping[str, Any], method: str, folder: Path) -> dict[str, Any]:
    """What one method says, before and after, and what it recovered."""
    both = [result["audit"][phase]["methods"][method] for phase in _PHASES]
    rows = [
        ("verdict", *("poisoned" if scores["poisoned"] else "clean" for scores in both)),
        ("most suspicious class", *(class_label(result, scores["target"]) for scores in both)),
        ("score of this class", *(_number(scores["score"]) for scores in both)),
    ]
    if any(scores.get("p_value") is not None for scores in both):
        rows.append(("p-value, not corrected", *(p_value_in_words(scores.get("p_value")) for scores in both)))
    if any("norm" in scores for scores in both):
        rows.append(
            ("norm, in units of the distance between classes", *(_number(scores.get("norm")) for scores in both))
        )
    for rank, ordinal in list(_ORDINALS.items())[: len(result["classes"]) - 1]:
        rows.append(
            (f"{ordinal} highest, as class: score", *(_ranked(result, scores["classes"], rank) for scores in both))
        )
    rows.append(("seconds, with compilation", *(f"{scores['seconds'] + scores['compile']:.1f}" for scores in both)))
    phases = []
    for phase in _PHASES:
        pictures = [
            _Picture(
                data_uri(folder / row["file"]),
                f"recovered by {method} {phase} purification: {row['title']}",
                row["title"],
            )
            for row in result["audit"][phase]["pictures"]
            if row["method"] == method
        ]
        if pictures:
            phases.append({"name": phase, "pictures": pictures})
    return {
        "name": method,
        "rows": rows,
        "caption": f"Findings of {method} before and after purification",
        "phases": phases,
    }


def _accuracy(result: Mapping[str, Any]) -> dict[str, Any]:
    """Clean accuracies with their intervals, and the attack success rate where the trigger is known."""
    rows, bars = [], []
    for phase, accuracy in result["accuracy"].items():
        low, rate, high = (100 * accuracy[name] for name in ("low", "rate", "high"))
        rows.append((phase, f"{rate:.1f} %", f"{low:.1f} to {high:.1f} %", f"{accuracy['right']} of {accuracy['n']}"))
        low, rate, high = (round(value, 2) for value in (low, rate, high))
        label = f"{phase}: {rate:.1f} %, interval {low:.1f} to {high:.1f} %"
        bars.append({"phase": phase, "low": low, "value": rate, "high": high, "label": label})
    asr = result["asr"]
    if asr:
        rates = " → ".join(f"{100 * asr[phase]:.1f} %" for phase in _PHASES)
        asr = {"attack": asr["attack"], "rates": rates, "n": asr["n"]}
    data_notes = " ".join(result.get("data_notes") or ())
    return {"rows": rows, "bars": bars, "asr": asr, "unmeasured": UNMEASURED, "data_notes": data_notes}


def _changed(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How many predictions changed, and pictures of the first of each sort."""
    changed, n = result["changed"], result["n_held_out"]
    rows = [(words, changed[sort]) for sort, words in _SORTS.items()]
    groups = []
    for sort, words in _SORTS.items():
        pictures = []
        for row in (row for row in changed["shown"] if row["sort"] == sort):
            before, after, label = (class_label(result, row[key]) for key in ("before", "after", "label"))
            alternative = f"image of class {label}, predicted as {before} before and as {after} after"
            pictures.append(
                _Picture(data_uri(folder / row["file"]), alternative, f"{before} → {after}; true class {label}")
            )
        if pictures:
            shown = f" (the first {len(pictures)} of {changed[sort]})" if changed[sort] > len(pictures) else ""
            groups.append({"heading": _capitalise(words) + shown, "pictures": pictures})
    all_rows = [*rows, ("all changed predictions", f"{changed['all']} of {n}")]
    return {"count": changed["all"], "rows": all_rows, "groups": groups}


def _done(result: Mapping[str, Any]) -> dict[str, Any]:
    """The defense with its settings, what it cost, what was written, and the versions."""
    defaults, seconds, weights, data = (result[name] for name in ("defaults", "seconds", "weights", "data"))
    settings = []
    for name, value in result["defense_config"].items():
        default = defaults.get(name)
        settings.append((name, _setting(value), "" if default == value else f"default {_setting(default)}"))
    facts = [
        _Fact("defense", result["defense"]),
        _Fact("seed", result["seed"]),
        _Fact("clean images", f"{result['n_defender']} from {data['spec']} (fingerprint {data['fingerprint'][:16]}…)"),
        _Fact("audit methods", ", ".join(result["audit"]["before"]["methods"])),
        _Fact("seconds", f"{seconds['defense']:.1f}, plus {seconds['compile']:.1f} for compilation"),
        _Fact("exported weights", f"{weights['file']}: {weights['tensors']} tensors, named as in {weights['names']}"),
        _Fact("sha256 of the exported weights", weights["sha256"], code=True),
    ]
    environment = [_Fact(name, value) for name, value in result["env"].items() if value is not None]
    return {
        "facts": facts,
        "settings": settings,
        "caption": f"Settings of {result['defense']}",
        "environment": environment,
    }


def _undo(result: Mapping[str, Any]) -> dict[str, Any]:
    """Commands that check the incoming file and export its weights again."""
    incoming, weights = result["input"], result["weights"]
    check = ""
    if incoming["kind"] == "file":
        line = shlex.quote(f"{incoming['sha256']}  {incoming['path']}")
        check = f"echo {line} | sha256sum --check"
    out = f"original{Path(weights['file']).suffix}"
    export = ["bdjax", "export", result["model"]["directory"], "--format", weights["format"], "--out", out]
    return {"path": incoming["path"], "check": check, "export": shlex.join(export), "command": result["command"]}


def _ranked(result: Mapping[str, Any], scores: list[float | None], rank: int) -> str:
    """The class of that rank (1: the highest score) with its score; a dash when fewer were judged."""
    judged = sorted((-score, label) for label, score in enumerate(scores) if score is not None)
    if rank > len(judged):
        return "–"
    return f"{class_label(result, judged[rank - 1][1])}: {_number(-judged[rank - 1][0])}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _shortened(names: list[str], most: int) -> str:
    """The first names with commas between them, and how many more there are."""
    return ", ".join(names[:most]) + (f", … {len(names) - most} more" if len(names) > most else "")


def _capitalise(words: str) -> str:
    """The same text with a capital first letter."""
    return words[:1].upper() + words[1:]
