"""What a defense changed inside a network, as a table for a terminal and as a figure."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.io.files import remove_symlink
from bdjax.pipelines.inspection import MAIN as _FRACTION

MAIN = str(_FRACTION)
"""Fraction of the channels that the table and the figure are about, as the key of a result."""
_MODELS = ("victim", "purified", "clean")
_COLOURS = {"victim": "tab:red", "purified": "tab:blue", "clean": "tab:green"}
_MAX_CLASSES = 20  # with a bar or a colour of their own
_MIN_BEC = -1.0  # lower end of the axis; smaller values are written beside their points


def write(result: Mapping[str, Any], directory: Path) -> str:
    """Write inspection.json and inspection.png into `directory`; return the table and the paths as text."""
    directory.mkdir(parents=True, exist_ok=True)
    picture, file = draw(result, directory / "inspection.png"), directory / "inspection.json"
    checkpoint.write_text(file, json.dumps(result) + "\n")
    return f"{table(result)}\npicture: {picture}\nresult:  {file}"


def check_directory(directory: Path) -> None:
    """Raise InputError, before anything is computed, when `directory` cannot be created."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--out {directory}: {existing} is a file. Give the name of a directory.")


def table(result: Mapping[str, Any]) -> str:
    """The numbers as text: rates, a line per layer, means over layers, silhouettes, and notes."""
    models = _present(result)
    lines = [
        _title(result),
        f"rates: n = {result['n_test']} clean and {result['n_asr']} triggered test images; other numbers: "
        f"{result['n_clean']} and {result['n_triggered']} of them",
        "",
        f"{'':26s}" + "".join(f"{name:>10s}" for name in models),
    ]
    for label, key in (("clean accuracy, %", "acc"), ("attack success rate, %", "asr")):
        lines.append(f"{label:26s}" + "".join(f"{100 * result['rates'][name][key]:10.2f}" for name in models))
    if result["target"] is not None:
        accuracies = [result["class_accuracy"][name][result["target"]] for name in models]
        cells = "".join(f"{'–' if a is None else f'{100 * a:.2f}':>10s}" for a in accuracies)
        lines.append(f"{'accuracy of the target, %':26s}{cells}   class {result['classes'][result['target']]}")
    percent = f"{100 * float(MAIN):g} %"
    lines += ["", f"The {percent} of channels with the largest TAC in the victim, on triggered images"]
    lines.append(
        f"{'layer':12s}{'channels':>10s}{'TAC vict.':>11s}{'purified':>10s}{'clean':>10s}{'median':>10s}"
        f"{'CKA pur.':>10s}{'clean':>10s}{'BEC':>10s}"
    )
    for row in result["layers"]:
        top, tac = row["top"][MAIN], row["tac"]
        channels = f"{len(top['channels'])} of {row['shape'][-1]}"
        lines.append(
            f"{row['name']:12s}{channels:>10s}{_cell(tac['top']['victim'], 11, 2)}"
            + "".join(_cell(value, 10, 2) for value in (tac["top"]["purified"], tac["top"]["clean"], tac["median"]))
            + "".join(_cell(top[key], 10, 3) for key in ("cka_purified", "cka_clean", "bec"))
            + (" *" if top["clipped"] else "")
        )
    lines += ["", f"{'mean over ' + _counted(result):34s}{'CKA pur.':>10s}{'clean':>10s}{'BEC':>10s}{'sigmoid':>10s}"]
    for fraction, mean in result["means"].items():
        label = f"{100 * float(fraction):g} % of the channels"
        keys = ("cka_purified", "cka_clean", "bec", "bec_sigmoid")
        lines.append(f"{label:34s}" + "".join(_cell(mean[key], 10, 3) for key in keys))
    lines += ["", f"{'silhouette':52s}{'before':>10s}{'after':>10s}"]
    phases = [result["silhouette"][phase] for phase in ("before", "after")]
    if result["target"] is not None:
        lines.append(f"{'clean / triggered in the cluster of the target':52s}" + _cells(phases, "target_cluster"))
        counts = "".join(f"{str(p['n_clean']) + ' / ' + str(p['n_triggered']):>10s}" for p in phases)
        lines.append(f"{'  images in it':52s}{counts}")
    lines.append(f"{'triggered images by true class':52s}" + _cells(phases, "true_classes"))
    return "\n".join([*lines, "", *(textwrap.fill(note, 100) for note in notes(result))])


def notes(result: Mapping[str, Any]) -> list[str]:
    """Definitions of the numbers, and warnings about the clean model, as sentences."""
    sentences = [
        "TAC: mean l2 norm of the change that the trigger makes to a channel's activation map; the median is over all "
        "channels of the victim. CKA: similarity to the victim, 1 when equal."
    ]
    differs = result["clean_differs"]
    if differs is None:
        return [
            *sentences,
            "No clean model was given, so there is no BEC, only CKA. `bdjax train clean --seed S` makes one.",
        ]
    sentences.append(
        "BEC: 1 for the victim, 0 for the clean model, below 0 for a model less similar to the victim than the clean "
        "one. Any change of features lowers it, so it does not prove removal. Its sigmoid has our constants, k = 10 "
        "and c = 0.5."
    )
    if any(row["top"][MAIN]["clipped"] for row in result["layers"]):
        sentences.append(
            "* The clean model is so similar to the victim in this layer that the denominator was raised to 0.001."
        )
    if "seed" not in differs:
        sentences.append(
            "The clean model has the victim's seed: it was trained from the same initial weights and is too similar to "
            "the victim for BEC. Train it with another --seed."
        )
    if recipe := [name for name in differs if name != "seed"]:
        sentences.append(f"The clean model was trained with other settings than the victim: {', '.join(recipe)}.")
    return sentences


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG: t-SNE before and after, accuracy by class, similarity to the victim by layer. Returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12, 10), layout="constrained")
    figure.suptitle(_title(result), fontsize=12, parse_math=False)
    upper, lower = np.ravel(figure.subfigures(2, 1, height_ratios=(1.35, 1)))
    axes = upper.subplots(1, 2)
    for axis, phase, name in zip(axes, ("before", "after"), ("victim", "purified"), strict=True):
        legend = _scatter(axis, result, phase)
        rates = result["rates"][name]
        axis.set_title(f"{phase}: {name}, ACC {100 * rates['acc']:.1f} %, ASR {100 * rates['asr']:.1f} %", fontsize=10)
    if len(result["classes"]) <= _MAX_CLASSES:
        upper.legend(
            *legend, loc="outside lower center", ncols=min(len(legend[0]), 12), fontsize=8, frameon=False,
            title="colour: true class", title_fontsize=8,
        )  # fmt: skip
    left_axis, right_axis = lower.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_accuracies(left_axis, result)
    _draw_layers(right_axis, result)
    figure.savefig(remove_symlink(path), dpi=110)
    plt.close(figure)
    return path


def _scatter(axis: Any, result: Mapping[str, Any], phase: str) -> tuple[list[Any], list[str]]:
    """Draw dots for clean images and crosses for triggered ones; return handles and names for a legend."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    points, labels = np.array(result["tsne"][phase]), np.array(result["tsne"]["labels"])
    triggered, classes = np.array(result["tsne"]["triggered"]), len(result["classes"])
    name = "tab10" if classes <= 10 else "tab20" if classes <= _MAX_CLASSES else "turbo"
    colours = colormaps[name](np.arange(classes) if classes <= _MAX_CLASSES else np.linspace(0, 1, classes))
    for selected, style in ((~triggered, {"marker": "o", "s": 26, "alpha": 0.5, "linewidths": 0}),
                            (triggered, {"marker": "x", "s": 20, "alpha": 0.9, "linewidths": 0.9})):  # fmt: skip
        axis.scatter(*points[selected].T, c=colours[labels[selected]], **style)
    axis.set(xticks=[], yticks=[], xlabel="t-SNE of the features before the head: • clean, × triggered")
    handles: list[Any] = [Line2D([], [], marker="s", linestyle="", color=colour) for colour in colours]
    names = [_class(result, label) + (" (target)" if label == result["target"] else "") for label in range(classes)]
    return handles, names


def _draw_accuracies(axis: Any, result: Mapping[str, Any]) -> None:
    """Draw the accuracy of every class and model as bars; of many classes those that changed most."""
    models = _present(result)
    values = {m: np.array([np.nan if a is None else 100 * a for a in result["class_accuracy"][m]]) for m in models}
    classes = np.arange(len(result["classes"]))
    title = "accuracy by class, clean test images"
    if len(classes) > _MAX_CLASSES:
        change = np.nan_to_num(np.abs(values["purified"] - values["victim"]), nan=-1.0)
        if result["target"] is not None:
            change[result["target"]] = np.inf
        classes = np.sort(np.argsort(-change, kind="stable")[:_MAX_CLASSES])
        title += f" ({_MAX_CLASSES} that changed most)"
    width = 0.84 / len(models)
    for number, name in enumerate(models):
        positions = np.arange(len(classes)) + (number - (len(models) - 1) / 2) * width
        axis.bar(positions, values[name][classes], width, color=_COLOURS[name], label=name)
    names = [_class(result, label) for label in classes.tolist()]
    slanted = max(map(len, names)) > 3
    axis.set_xticks(range(len(classes)), names, fontsize=8, rotation=60 if slanted else 0, parse_math=False)
    for tick, label in zip(axis.get_xticklabels(), classes, strict=True):
        tick.set_fontweight("bold" if label == result["target"] else "normal")
    axis.set(ylim=(0, 104), ylabel="%", xlabel="" if result["target"] is None else "class (bold: the target)")
    axis.set_title(f"{title}, n = {result['n_test']}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, loc="lower right", ncols=len(models))


def _draw_layers(axis: Any, result: Mapping[str, Any]) -> None:
    """Draw CKA and BEC of every layer."""
    rows = [row["top"][MAIN] for row in result["layers"]]
    positions = np.arange(len(rows))
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.axhline(0, color="0.6", linewidth=0.8)
    for name in _present(result)[1:]:
        axis.plot(
            positions,
            [row[f"cka_{name}"] for row in rows],
            color=_COLOURS[name],
            marker="o",
            markersize=5,
            label=f"CKA, {name} with victim",
        )
    low = 0.0
    if rows[0]["bec"] is not None:
        values = np.array([row["bec"] for row in rows])
        clipped = np.clip(values, _MIN_BEC, None)
        low = float(clipped.min())
        axis.plot(positions, clipped, color="black", marker="D", markersize=5, linestyle="--", label="BEC of purified")
        for position, value in zip(positions[values < _MIN_BEC], values[values < _MIN_BEC], strict=True):
            axis.annotate(f"{value:.1f} ↓", (position, _MIN_BEC), (4, 6), textcoords="offset points", fontsize=8)
    axis.set_ylim(low - 0.08, 1.08)
    axis.set_xlim(-0.4, len(rows) - 0.6)
    axis.set_xticks(
        positions, [row["name"] for row in result["layers"]], fontsize=8, rotation=45 if len(rows) > 6 else 0
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    bec = result["means"][MAIN]["bec"]
    mean = "no BEC without a clean model" if bec is None else f"mean BEC {bec:.2f}"
    axis.set_title(
        f"similarity to the victim in the {100 * float(MAIN):g} % of its channels with the largest TAC\n"
        f"n = {result['n_triggered']} triggered images; {mean}",
        fontsize=10,
    )


def _present(result: Mapping[str, Any]) -> list[str]:
    """Names of the models that were given."""
    return [name for name in _MODELS if result["rates"][name] is not None]


def _title(result: Mapping[str, Any]) -> str:
    """Attack, defense, data set, model and seed."""
    purified = result["models"]["purified"]
    defense = Path(purified["defense"]["name"]).stem if purified["defense"] else "another model"
    return (
        f"{Path(result['attack']).stem} -> {defense} on {result['dataset']} ({result['model']}), "
        f"seed {result['models']['victim']['seed']}"
    )


def _class(result: Mapping[str, Any], label: int) -> str:
    """A class's name, shortened in the middle to 15 characters."""
    name = result["classes"][label]
    return name if len(name) <= 15 else f"{name[:7]}…{name[-7:]}"


def _counted(result: Mapping[str, Any]) -> str:
    """Which layers the means are over."""
    counted, layers = len(result["counted"]), len(result["layers"])
    return f"{layers} layers" if counted == layers else f"the last {counted} of {layers} layers"


def _cell(value: float | None, width: int, digits: int) -> str:
    """A number as a cell of a table; a dash for None."""
    return f"{'–' if value is None else f'{value:.{digits}f}':>{width}s}"


def _cells(phases: list[dict[str, Any]], key: str) -> str:
    """One number of each phase as cells of a table."""
    return "".join(_cell(phase[key], 10, 3) for phase in phases)
