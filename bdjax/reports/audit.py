"""An audit as text, and as a picture of the triggers that its methods recovered."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink

_MAX_IMAGES = 8  # in a row of the picture


def table(result: Mapping[str, Any]) -> str:
    """The verdict, then a line for each method."""
    width = max(16, *(len(name) for name in result["methods"])) if result["methods"] else 16
    images = f"n = {result['n']} clean images" if result["n"] else "without clean images"
    lines = [
        f"{result['directory']}: {verdict(result)}",
        f"{result['model']} on {result['dataset']}, {images}, seed {result['seed']}",
        f"{'method':{width}s}{'verdict':>10s}{'class':>14s}{'score':>9s}{'p-value':>10s}{'seconds':>9s}",
    ]
    lines += [line(result, name, scores, width) for name, scores in result["methods"].items()]
    lines.append("class: the most suspicious one for the method, whatever its verdict.")
    lines.append("score: of that class; scales differ between methods. seconds: without compilation.")
    lines.append("p-value: probability of so suspicious a class in a clean model; not yet corrected for the methods.")
    if result.get("skipped"):
        lines.append(f"not run, because the budget was spent: {', '.join(result['skipped'])}")
    return "\n".join(lines)


def line(result: Mapping[str, Any], name: str, scores: Mapping[str, Any], width: int = 16) -> str:
    """One line of the table.

    Args:
      result: the audit's; only "classes" is used.
      name: of the method.
      scores: its finding.
      width: of the first column, in characters.

    Returns:
      The line.
    """
    method_verdict = "poisoned" if scores["poisoned"] else "clean"
    score = "-" if scores["score"] is None else f"{scores['score']:.2f}"
    p_value = "-" if scores.get("p_value") is None else format_p_value(scores["p_value"])
    label = class_label(result, scores["target"])
    return f"{name:{width}s}{method_verdict:>10s}{label:>14s}{score:>9s}{p_value:>10s}{scores['seconds']:>9.1f}"


def sentence(scores: Mapping[str, Any]) -> str:
    """A finding in words, as it is printed when a detector has finished."""
    accused = "accuses" if scores["poisoned"] else "does not accuse"
    p_value = "" if scores.get("p_value") is None else f", p = {format_p_value(scores['p_value'])}"
    return f"{accused} class {scores['target']}, its most suspicious one{p_value} ({scores['seconds']:.1f} s)"


def format_p_value(value: float) -> str:
    """A p-value with two digits, in exponential form below 0.001."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def p_value_in_words(value: float | None) -> str:
    """A p-value with how strong the evidence is."""
    if value is None:
        return "none"
    steps = ((0.001, "very strong evidence"), (0.01, "strong evidence"), (0.05, "some evidence"), (1.0, "no evidence"))
    return f"{format_p_value(value)} ({next(words for most, words in steps if value <= most)})"


def verdict(result: Mapping[str, Any]) -> str:
    """The verdict as one sentence, without a capital letter and full stop."""
    methods = result["methods"]
    if result["poisoned"]:
        targets = result.get("targets") or [result["target"]]
        classes = "class" if len(targets) == 1 else "classes"
        labels = ", ".join(class_label(result, label) for label in targets)
        return f"suspected of a backdoor towards {classes} {labels}, by {', '.join(result['accused_by'])}" + _p(result)
    lone = [name for name, scores in methods.items() if scores["poisoned"] and scores.get("p_value") is None]
    counted = f"{len(methods)} method{'s' * (len(methods) != 1)}"
    if lone:
        finding = (
            f"{counted} do not agree on a backdoor; {', '.join(lone)} flagged a class that no other method flagged"
        )
    else:
        finding = f"no backdoor found by {counted}{_p(result)}"
    return f"{finding} (this does not prove that the model is clean)"


def _p(result: Mapping[str, Any]) -> str:
    """The corrected p-value of the verdict, with a leading blank; empty when there is none."""
    value = result.get("p_value")
    return "" if value is None else f" (p = {format_p_value(value)})"


def draw(result: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: Path) -> Path:
    """Write a PNG with a row of images for each method that recovered a trigger.

    Args:
      result: as `bdjax.pipelines.audit.audit` returns it.
      arrays: as `bdjax.pipelines.audit.audit` returns them.
      path: file to write.

    Returns:
      `path`.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    rows = recovered_images(result, arrays) or [("", [], [])]
    figure, axes = plt.subplots(
        len(rows), _MAX_IMAGES, figsize=(9, 1.35 * len(rows) + 0.5), squeeze=False, layout="constrained"
    )
    for row_axes, (name, images, titles) in zip(axes, rows, strict=True):
        for axis in row_axes:
            axis.set_axis_off()
        for axis, image, title in zip(row_axes, images, titles, strict=False):
            axis.imshow(np.repeat(image, 3, -1) if image.shape[-1] == 1 else image, vmin=0, vmax=1)
            axis.set_title(title, fontsize=7, parse_math=False)
        row_axes[0].text(-0.15, 0.5, name, transform=row_axes[0].transAxes, ha="right", va="center", fontsize=8)
    figure.suptitle(verdict(result), fontsize=9, parse_math=False)
    figure.savefig(remove_symlink(path), dpi=130)
    plt.close(figure)
    return path


def recovered_images(
    result: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> list[tuple[str, list[np.ndarray], list[str]]]:
    """Collect some clean images, then for each method the triggers that it recovered, the most suspicious first.

    Args:
      result: as `bdjax.pipelines.audit.audit` returns it.
      arrays: "clean" [n, H, W, C]; "METHOD/recovered" [k, h, w, C] with "METHOD/recovered_labels" [k];
        "METHOD/perturbation" [n, H, W, C], of which the first is used.

    Returns:
      Rows of ("clean" or the method's name, at most 8 images [h, w, C] in [0, 1], their titles).
    """
    clean = list(_unit(arrays["clean"]))[:_MAX_IMAGES]
    rows = [("clean", clean, [""] * _MAX_IMAGES)] if clean else []
    for name in result["methods"]:
        if f"{name}/recovered" in arrays:
            triggers, labels = arrays[f"{name}/recovered"], arrays[f"{name}/recovered_labels"]
            scores = [result["methods"][name]["classes"][label] for label in labels]
            order = np.argsort([np.inf if score is None else -score for score in scores], kind="stable")[:_MAX_IMAGES]
            titles = [f"→ {class_label(result, int(labels[i]))}" for i in order]
            rows.append((name, [np.clip(triggers[i], 0, 1) for i in order], titles))
        if f"{name}/perturbation" in arrays:
            delta = np.asarray(arrays[f"{name}/perturbation"])[0]
            scaled = np.clip(0.5 + delta / (2 * max(float(np.abs(delta).max()), 1e-12)), 0, 1)
            perturbed = [np.clip(image + delta, 0, 1) for image in clean[: _MAX_IMAGES - 1]]
            rows.append((name, [scaled, *perturbed], ["δ, scaled", *["image + δ"] * len(perturbed)]))
    return rows


def class_label(result: Mapping[str, Any], label: int) -> str:
    """A class's number, followed by its name where that is another one."""
    name = result["classes"][label]
    return str(label) if name == str(label) else f"{label} ({name})"


def _unit(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1]."""
    return images / np.float32(255) if images.dtype == np.uint8 else images
