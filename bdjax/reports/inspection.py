"""A look inside networks as a table for a terminal and as a picture."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.io.files import remove_symlink
from bdjax.pipelines.inspection import MAIN as _FRACTION

MAIN = str(_FRACTION)
_MODELS = ("victim", "purified", "clean")
_COLOURS = {"victim": "tab:red", "purified": "tab:blue", "clean": "tab:green"}
_MOST = 20  # classes with a bar or a colour of their own
_LOWEST = -1.0  # of the axis of BEC; what is below is written beside the point


def write(result: dict[str, Any], directory: Path) -> str:
    """Put inspection.json and inspection.png into `directory`; the table, and where they are."""
    directory.mkdir(parents=True, exist_ok=True)
    picture, file = draw(result, directory / "inspection.png"), directory / "inspection.json"
    checkpoint.write_text(file, json.dumps(result) + "\n")
    return f"{table(result)}\npicture: {picture}\nresult:  {file}"


def check_directory(directory: Path) -> None:
    """Raise InputError, before any computing, when `directory` cannot be one."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--out {directory}: {there} is a file. Give the name of a directory.")


def table(result: dict[str, Any]) -> str:
    """The numbers as text: rates, a line a layer, the means, how well images are apart, and what to make of them."""
    models = _present(result)
    lines = [
        _title(result),
        f"rates: n = {result['n_test']} clean and {result['n_asr']} triggered test images; all else: "
        f"{result['n_clean']} and {result['n_triggered']} of them",
        "",
        f"{'':26s}" + "".join(f"{name:>10s}" for name in models),
    ]
    for label, key in (("clean accuracy, %", "acc"), ("attack success rate, %", "asr")):
        lines.append(f"{label:26s}" + "".join(f"{100 * result['rates'][name][key]:10.2f}" for name in models))
    if result["target"] is not None:
        own = [result["class_accuracy"][name][result["target"]] for name in models]
        cells = "".join(f"{'–' if a is None else f'{100 * a:.2f}':>10s}" for a in own)
        lines.append(f"{'accuracy of the target, %':26s}{cells}   class {result['classes'][result['target']]}")
    share = f"{100 * float(MAIN):g} %"
    lines += ["", f"The victim's {share} channels of largest TAC, on triggered images"]
    lines.append(
        f"{'layer':12s}{'channels':>10s}{'TAC vict.':>11s}{'purified':>10s}{'clean':>10s}{'median':>10s}"
        f"{'CKA pur.':>10s}{'clean':>10s}{'BEC':>10s}"
    )
    for row in result["layers"]:
        top, tac = row["top"][MAIN], row["tac"]
        channels = f"{len(top['channels'])} of {row['shape'][-1]}"
        lines.append(
            f"{row['name']:12s}{channels:>10s}{_n(tac['top']['victim'], 11, 2)}"
            + "".join(_n(value, 10, 2) for value in (tac["top"]["purified"], tac["top"]["clean"], tac["median"]))
            + "".join(_n(top[key], 10, 3) for key in ("cka_purified", "cka_clean", "bec"))
            + (" *" if top["clipped"] else "")
        )
    lines += ["", f"{'mean over ' + _counted(result):34s}{'CKA pur.':>10s}{'clean':>10s}{'BEC':>10s}{'sigmoid':>10s}"]
    for fraction, mean in result["means"].items():
        label = f"{100 * float(fraction):g} % of the channels"
        keys = ("cka_purified", "cka_clean", "bec", "bec_sigmoid")
        lines.append(f"{label:34s}" + "".join(_n(mean[key], 10, 3) for key in keys))
    lines += ["", f"{'silhouette':52s}{'before':>10s}{'after':>10s}"]
    phases = [result["silhouette"][phase] for phase in ("before", "after")]
    if result["target"] is not None:
        lines.append(f"{'clean / triggered in the cluster of the target':52s}" + _each(phases, "target_cluster"))
        counts = "".join(f"{str(p['n_clean']) + ' / ' + str(p['n_triggered']):>10s}" for p in phases)
        lines.append(f"{'  images in it':52s}{counts}")
    lines.append(f"{'triggered images by true class':52s}" + _each(phases, "true_classes"))
    return "\n".join([*lines, "", *(textwrap.fill(note, 100) for note in notes(result))])


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know of the numbers."""
    found = [
        "TAC: mean l2 norm of the trigger's change of a channel's map; the median is over all channels of the victim. "
        "CKA: likeness to the victim, 1 for equal."
    ]
    differs = result["clean_differs"]
    if differs is None:
        return [
            *found,
            "No clean model was given, so there is no BEC, only CKA. `bdjax train clean --seed S` makes one.",
        ]
    found.append(
        "BEC: 1 for the victim, 0 for the clean model, below 0 for one less like the victim than that. Any change of "
        "features lowers it: it is no proof of removal. Its sigmoid has our constants, k = 10 and c = 0.5."
    )
    if any(row["top"][MAIN]["clipped"] for row in result["layers"]):
        found.append("* The clean model is so like the victim there that the denominator was raised to 0.001.")
    if "seed" not in differs:
        found.append(
            "The clean model has the victim's seed: it began with the same weights and is too like the victim to "
            "measure BEC by. Train it with another --seed."
        )
    if recipe := [name for name in differs if name != "seed"]:
        found.append(f"The clean model was trained by another recipe than the victim: {', '.join(recipe)}.")
    return found


def draw(result: dict[str, Any], path: Path) -> Path:
    """Write a PNG: t-SNE before and after, accuracy by class, likeness to the victim by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12, 10), layout="constrained")
    figure.suptitle(_title(result), fontsize=12, parse_math=False)
    upper, lower = np.ravel(figure.subfigures(2, 1, height_ratios=(1.35, 1)))
    axes = upper.subplots(1, 2)
    for axis, phase, name in zip(axes, ("before", "after"), ("victim", "purified"), strict=True):
        marks = _scatter(axis, result, phase)
        rates = result["rates"][name]
        axis.set_title(f"{phase}: {name}, ACC {100 * rates['acc']:.1f} %, ASR {100 * rates['asr']:.1f} %", fontsize=10)
    if len(result["classes"]) <= _MOST:
        upper.legend(
            *marks, loc="outside lower center", ncols=min(len(marks[0]), 12), fontsize=8, frameon=False,
            title="colour: true class", title_fontsize=8,
        )  # fmt: skip
    left, right = lower.subplots(1, 2, width_ratios=(1.15, 1))
    _bars(left, result)
    _layers(right, result)
    figure.savefig(remove_symlink(path), dpi=110)
    plt.close(figure)
    return path


def _scatter(axis: Any, result: dict[str, Any], phase: str) -> tuple[list[Any], list[str]]:
    """Dots for clean images, crosses for triggered ones; the handles and names of a legend."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    at, labels = np.array(result["tsne"][phase]), np.array(result["tsne"]["labels"])
    triggered, classes = np.array(result["tsne"]["triggered"]), len(result["classes"])
    name = "tab10" if classes <= 10 else "tab20" if classes <= _MOST else "turbo"
    colours = colormaps[name](np.arange(classes) if classes <= _MOST else np.linspace(0, 1, classes))
    for shown, style in ((~triggered, {"marker": "o", "s": 26, "alpha": 0.5, "linewidths": 0}),
                         (triggered, {"marker": "x", "s": 20, "alpha": 0.9, "linewidths": 0.9})):  # fmt: skip
        axis.scatter(*at[shown].T, c=colours[labels[shown]], **style)
    axis.set(xticks=[], yticks=[], xlabel="t-SNE of the features before the head: • clean, × triggered")
    handles: list[Any] = [Line2D([], [], marker="s", linestyle="", color=colour) for colour in colours]
    names = [_class(result, label) + (" (target)" if label == result["target"] else "") for label in range(classes)]
    return handles, names


def _bars(axis: Any, result: dict[str, Any]) -> None:
    models = _present(result)
    values = {m: np.array([np.nan if a is None else 100 * a for a in result["class_accuracy"][m]]) for m in models}
    shown = np.arange(len(result["classes"]))
    title = "accuracy by class, clean test images"
    if len(shown) > _MOST:
        change = np.nan_to_num(np.abs(values["purified"] - values["victim"]), nan=-1.0)
        if result["target"] is not None:
            change[result["target"]] = np.inf
        shown = np.sort(np.argsort(-change, kind="stable")[:_MOST])
        title += f" ({_MOST} that changed most)"
    width = 0.84 / len(models)
    for number, name in enumerate(models):
        places = np.arange(len(shown)) + (number - (len(models) - 1) / 2) * width
        axis.bar(places, values[name][shown], width, color=_COLOURS[name], label=name)
    names = [_class(result, label) for label in shown.tolist()]
    slanted = max(map(len, names)) > 3
    axis.set_xticks(range(len(shown)), names, fontsize=8, rotation=60 if slanted else 0, parse_math=False)
    for tick, label in zip(axis.get_xticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if label == result["target"] else "normal")
    axis.set(ylim=(0, 104), ylabel="%", xlabel="" if result["target"] is None else "class (bold: the target)")
    axis.set_title(f"{title}, n = {result['n_test']}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, loc="lower right", ncols=len(models))


def _layers(axis: Any, result: dict[str, Any]) -> None:
    rows = [row["top"][MAIN] for row in result["layers"]]
    places = np.arange(len(rows))
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.axhline(0, color="0.6", linewidth=0.8)
    for name in _present(result)[1:]:
        axis.plot(
            places,
            [row[f"cka_{name}"] for row in rows],
            color=_COLOURS[name],
            marker="o",
            markersize=5,
            label=f"CKA, {name} with victim",
        )
    low = 0.0
    if rows[0]["bec"] is not None:
        values = np.array([row["bec"] for row in rows])
        drawn = np.clip(values, _LOWEST, None)
        low = float(drawn.min())
        axis.plot(places, drawn, color="black", marker="D", markersize=5, linestyle="--", label="BEC of purified")
        for place, value in zip(places[values < _LOWEST], values[values < _LOWEST], strict=True):
            axis.annotate(f"{value:.1f} ↓", (place, _LOWEST), (4, 6), textcoords="offset points", fontsize=8)
    axis.set_ylim(low - 0.08, 1.08)
    axis.set_xlim(-0.4, len(rows) - 0.6)
    axis.set_xticks(places, [row["name"] for row in result["layers"]], fontsize=8, rotation=45 if len(rows) > 6 else 0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    bec = result["means"][MAIN]["bec"]
    mean = "no BEC without a clean model" if bec is None else f"mean BEC {bec:.2f}"
    axis.set_title(
        f"likeness to the victim in its {100 * float(MAIN):g} % channels of largest TAC\n"
        f"n = {result['n_triggered']} triggered images; {mean}",
        fontsize=10,
    )


def _present(result: dict[str, Any]) -> list[str]:
    return [name for name in _MODELS if result["rates"][name] is not None]


def _title(result: dict[str, Any]) -> str:
    purified = result["models"]["purified"]
    what = Path(purified["defense"]["name"]).stem if purified["defense"] else "another model"
    return (
        f"{Path(result['attack']).stem} -> {what} on {result['dataset']} ({result['model']}), "
        f"seed {result['models']['victim']['seed']}"
    )


def _class(result: dict[str, Any], label: int) -> str:
    name = result["classes"][label]
    return name if len(name) <= 15 else f"{name[:7]}…{name[-7:]}"


def _counted(result: dict[str, Any]) -> str:
    some, all_ = len(result["counted"]), len(result["layers"])
    return f"{all_} layers" if some == all_ else f"the last {some} of {all_} layers"


def _n(value: float | None, width: int, digits: int) -> str:
    return f"{'–' if value is None else f'{value:.{digits}f}':>{width}s}"


def _each(phases: list[dict[str, Any]], key: str) -> str:
    return "".join(_n(phase[key], 10, 3) for phase in phases)
