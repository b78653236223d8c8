"""An audit as text, and as a picture of the triggers that its methods recovered."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink

_MAX_IMAGES = 8  # in a row of the picture


def table(result: Mapping[str, Any]) -> str:
    """The verdict, then a line for each method."""
    width = max(16, *(len(name) for name in result["methods"]))
    lines = [
        f"{result['directory']}: {verdict(result)}",
        f"{result['model']} on {result['dataset']}, n = {result['n']} clean images, seed {result['seed']}",
        f"{'method':{width}s}{'verdict':>10s}{'class':>14s}{'score':>9s}{'seconds':>9s}",
    ]
    for name, scores in result["methods"].items():
        method_verdict = "poisoned" if scores["poisoned"] else "clean"
        score = "-" if scores["score"] is None else f"{scores['score']:.2f}"
        label = class_label(result, scores["target"])
        lines.append(f"{name:{width}s}{method_verdict:>10s}{label:>14s}{score:>9s}{scores['seconds']:>9.1f}")
    lines.append("class: the most suspicious one for the method, whatever its verdict.")
    lines.append("score: of that class; scales differ between methods. seconds: without compilation.")
    return "\n".join(lines)


def verdict(result: Mapping[str, Any]) -> str:
    """The verdict as one sentence, without a capital letter and full stop."""
    methods = result["methods"]
    if result["poisoned"]:
        accusers = ", ".join(result["accused_by"])
        return f"suspected of a backdoor towards class {class_label(result, result['target'])}, by {accusers}"
    lone = [name for name, scores in methods.items() if scores["poisoned"]]
    counted = f"{len(methods)} method{'s' * (len(methods) != 1)}"
    if lone:
        finding = (
            f"{counted} do not agree on a backdoor; {', '.join(lone)} flagged a class that no other method flagged"
        )
    else:
        finding = f"no backdoor found by {counted}"
    return f"{finding} (this does not prove that the model is clean)"


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

    rows = recovered_images(result, arrays)
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
    rows = [("clean", clean, [""] * _MAX_IMAGES)]
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
