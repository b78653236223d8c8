"""A purification as one HTML file for people: everything inside it, nothing to load, nothing that runs.

Whatever comes from a file, a class name or a command line goes through :func:`el`, which escapes it.
"""

import html
import shlex
from pathlib import Path
from string import Template
from typing import Any

from bdjax.io import checkpoint
from bdjax.reports._html import Safe, code, el, facts, gallery, picture, table
from bdjax.reports._style import CSS, PAGE
from bdjax.text import UNMEASURED, visible

__all__ = ["picture", "write"]

_TOP = 5  # classes of a method's evidence
_SORTS = {"broken": "right before, wrong now", "mended": "wrong before, right now", "other": "wrong before and now"}
_PHASES = ("before", "after")


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write FOLDER/report.html. Args: result: as `purification.purify` gives it; its pictures lie below `folder`."""
    sections = [
        el("section", el("h2", heading, id=anchor), *make(result, folder))
        for anchor, heading, make in (
            ("summary", "In short", _summary),
            ("input", "What came in", _input),
            ("audit", "What the audit found", _audit),
            ("accuracy", "Accuracy before and after", _accuracy),
            ("changed", "Predictions that changed", _changed),
            ("done", "What was done", _done),
            ("undo", "How to undo it", _undo),
        )
    ]
    title = f"{Path(result['input']['path']).name}: audited and cleaned"
    foot = el("footer", f"Made by bdjax {result['env']['bdjax']} on {result['env']['date']}.")
    text = Template(PAGE).substitute(
        title=html.escape(visible(title)), css=CSS, heading=el("h1", title), body="\n".join(sections), foot=foot
    )
    checkpoint.write_text(folder / "report.html", text)
    return folder / "report.html"


def _summary(result: dict[str, Any], folder: Path) -> list[Safe]:
    found, cards = result["audit"], []
    for phase, words in (("before", "Audit of what came in"), ("after", "Audit of the cleaned model")):
        kind = "bad" if found[phase]["poisoned"] else "plain"
        cards.append(
            el("div", el("h3", words), el("p", _first_up(found[phase]["verdict"]), "."), class_=f"card {kind}")
        )
    rates = " → ".join(f"{100 * result['accuracy'][phase]['rate']:.1f}\u00a0%" for phase in _PHASES)
    where = f"on {result['n_held_out']} images held out; {result['changed']['all']} predictions changed"
    cards.append(
        el("div", el("h3", "Clean accuracy"), el("p", rates, class_="big"), el("p", where), class_="card plain")
    )
    return [el("div", *cards, class_="cards"), el("ul", *(el("li", note) for note in result["notes"]))]


def _input(result: dict[str, Any], folder: Path) -> list[Safe]:
    incoming, model = result["input"], result["model"]
    source, of_file = model["source"], incoming["kind"] == "file"
    done = {name: value for name, value in (model["input"] or {}).items() if value}
    rows: list[tuple[str, Any]] = [
        ("file" if of_file else f"directory ({incoming['kind']})", el("code", incoming["path"])),
        ("sha256" if of_file else "hash in its manifest", el("code", incoming["sha256"])),
        ("architecture", model["model"]),
        ("images", " × ".join(map(str, model["shape"])) + " (height, width, channels)"),
        ("before the network", ", ".join(f"{k} {v}" for k, v in done.items()) or "taken as they are, in [0, 1]"),
        ("classes", f"{len(result['classes'])}: {_some(result['classes'], 20)}"),
    ]
    if not source:
        return [facts(rows)]
    under = f", under {source['key']!r}" if source["key"] else ""
    rows.append(("format", f"{source['format']}, {len(source['tensors'])} tensors{under}"))
    rows.append(("names", f"as by {source['names']}"))
    tensors = [(name, dtype, " × ".join(map(str, shape)) or "a number") for name, dtype, shape in source["tensors"]]
    listed = table(("tensor", "type", "shape"), tensors, "Tensors of the file")
    return [facts(rows), el("details", el("summary", f"All {len(tensors)} tensors by name"), listed)]


def _audit(result: dict[str, Any], folder: Path) -> list[Safe]:
    found = result["audit"]
    words = (
        f"{len(found['before']['methods'])} methods judged the model by {found['before']['n']} of the held-out images, "
        "before and after. It counts as suspected where two of them accuse one class (or the only one asked does)."
    )
    parts = [el("p", words)]
    if truth := found["before"]["truth"]:
        parts.append(el("p", f"The model was trained here, so the truth is known: its attack is {truth['attack']}."))
    parts += [el("article", *_evidence(result, method, folder)) for method in found["before"]["methods"]]
    words = (
        "A recovered patch is what a method needed to turn images to that class; δ is one perturbation for all images, "
        "drawn on grey and scaled. Of a clean model, too, something is recovered."
    )
    return [*parts, el("p", words, class_="note")]


def _evidence(result: dict[str, Any], method: str, folder: Path) -> list[Safe]:
    """What one method says, before and after, and what it recovered."""
    both = [result["audit"][phase]["methods"][method] for phase in _PHASES]
    rows = [
        ("says", *("poisoned" if own["poisoned"] else "clean" for own in both)),
        ("most suspicious class", *(_class(result, own["target"]) for own in both)),
        ("its score", *(_number(own["score"]) for own in both)),
    ]
    if any("norm" in own for own in both):
        rows.append(("norm, in distances between images", *(_number(own.get("norm")) for own in both)))
    for place in range(2, min(_TOP, len(result["classes"])) + 1):
        rows.append((f"{place}. by score", *(_ranked(result, own["classes"], place) for own in both)))
    rows.append(("seconds", *(f"{own['seconds'] + own['compile']:.1f}" for own in both)))
    parts = [el("h3", method), table(("", *_PHASES), rows, f"What {method} found before and after")]
    for phase in _PHASES:
        shown = [one for one in result["audit"][phase]["pictures"] if one["method"] == method]
        if shown:
            drawn = [(one["file"], f"recovered by {method} {phase}: {one['title']}", one["title"]) for one in shown]
            parts += [el("h4", f"Recovered {phase}"), gallery(folder, drawn)]
    return parts


def _accuracy(result: dict[str, Any], folder: Path) -> list[Safe]:
    rows = []
    for phase, own in result["accuracy"].items():
        between = f"{100 * own['low']:.1f} to {100 * own['high']:.1f} %"
        rows.append((phase, f"{100 * own['rate']:.1f} %", between, f"{own['right']} of {own['n']}"))
    words = (
        f"Of {result['n_defender'] + result['n_held_out']} clean images of {result['data']['spec']}, "
        f"{result['n_defender']} were used to clean with and {result['n_held_out']} were held out, drawn by class with "
        f"seed {result['seed']}. The defense saw none of the latter."
    )
    parts = [
        table(("", "accuracy", "95 % interval (Wilson)", "right"), rows, "Accuracy on held-out images"),
        el("div", *(_bar(phase, own) for phase, own in result["accuracy"].items())),
        el("p", words),
    ]
    if asr := result["asr"]:
        rates = " → ".join(f"{100 * asr[phase]:.1f} %" for phase in _PHASES)
        parts.append(
            el("p", f"The trigger is known ({asr['attack']}): its success rate {rates}, on {asr['n']} images.")
        )
    else:
        parts.append(el("p", f"Attack success rate: {UNMEASURED}."))
    if said := result.get("data_notes"):
        parts.append(el("p", " ".join(said)))
    return parts


def _bar(phase: str, own: dict[str, Any]) -> Safe:
    """A bar from 0 to 100 % with its interval, drawn in SVG."""
    low, rate, high = (round(100 * own[name], 2) for name in ("low", "rate", "high"))
    shapes = (
        el("rect", class_="track", x=0, y=2, width=100, height=6),
        el("rect", class_=phase, x=0, y=2, width=rate, height=6),
        el("path", class_="whisker", d=f"M{low} 5H{high}M{low} 3v4M{high} 3v4"),
    )
    label = f"{phase}: {rate:.1f} %, between {low:.1f} and {high:.1f} %"
    drawn = el("svg", *shapes, viewBox="0 0 100 10", preserveAspectRatio="none", role="img", aria_label=label)
    return el("div", el("span", phase), drawn, class_="bar")


def _changed(result: dict[str, Any], folder: Path) -> list[Safe]:
    changed, n = result["changed"], result["n_held_out"]
    rows = [(words, changed[sort]) for sort, words in _SORTS.items()]
    parts = [
        table(("", "images"), [*rows, ("all that changed", f"{changed['all']} of {n}")], "Predictions that changed")
    ]
    for sort, words in _SORTS.items():
        shown, drawn = [one for one in changed["shown"] if one["sort"] == sort], []
        for one in shown:
            before, after, label = (_class(result, one[key]) for key in ("before", "after", "label"))
            said = f"image of {label}, taken for {before} before and {after} after"
            drawn.append((one["file"], said, f"{before} → {after}; it is {label}"))
        if shown:
            some = f" (the first {len(shown)} of {changed[sort]})" if changed[sort] > len(shown) else ""
            parts += [el("h3", _first_up(words) + some), gallery(folder, drawn)]
    return parts


def _done(result: dict[str, Any], folder: Path) -> list[Safe]:
    defaults, seconds, weights, data = (result[name] for name in ("defaults", "seconds", "weights", "data"))
    settings = []
    for name, value in result["defense_config"].items():
        usual = defaults.get(name)
        settings.append((name, _value(value), "" if usual == value else f"default {_value(usual)}"))
    rows = [
        ("defense", result["defense"]),
        ("seed", result["seed"]),
        ("clean images", f"{result['n_defender']} of {data['spec']} (fingerprint {data['fingerprint'][:16]}…)"),
        ("audits", ", ".join(result["audit"]["before"]["methods"])),
        ("seconds", f"{seconds['defense']:.1f}, and {seconds['compile']:.1f} to compile"),
        ("written", f"{weights['file']}: {weights['tensors']} tensors, named as by {weights['names']}"),
        ("its sha256", el("code", weights["sha256"])),
    ]
    return [
        facts(rows),
        el("h3", "Every setting of the defense"),
        table(("setting", "value", ""), settings, f"Settings of {result['defense']}"),
        el("h3", "Versions and hardware"),
        facts([(name, value) for name, value in result["env"].items() if value is not None]),
    ]


def _undo(result: dict[str, Any], folder: Path) -> list[Safe]:
    incoming, weights = result["input"], result["weights"]
    parts = [el("p", "What came in was only read. To undo all of this, go on using it:"), code(incoming["path"])]
    if incoming["kind"] == "file":
        line = shlex.quote(f"{incoming['sha256']}  {incoming['path']}")
        parts += [el("p", "It is the same file as long as this says OK:"), code(f"echo {line} | sha256sum --check")]
    out = f"original{Path(weights['file']).suffix}"
    again = ["bdjax", "export", result["model"]["directory"], "--format", weights["format"], "--out", out]
    parts += [el("p", "Its weights, with the same names and bits, are written again by:"), code(shlex.join(again))]
    if result["command"]:
        parts += [el("p", "All of this was made by:"), code(result["command"])]
    return parts


def _ranked(result: dict[str, Any], scores: list[float | None], place: int) -> str:
    judged = sorted((-score, label) for label, score in enumerate(scores) if score is not None)
    if place > len(judged):
        return "–"
    return f"{_class(result, judged[place - 1][1])}: {_number(-judged[place - 1][0])}"


def _class(result: dict[str, Any], label: int) -> str:
    name = result["classes"][label]
    return str(label) if name == str(label) else f"{label} ({name})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _some(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f", … {len(names) - most} more" if len(names) > most else "")


def _first_up(words: str) -> str:
    return words[:1].upper() + words[1:]
