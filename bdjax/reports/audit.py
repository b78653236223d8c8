"""An audit as text and as a picture of what the methods recovered."""

from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink


def table(result: dict[str, Any]) -> str:
    """The verdict, then a line for each method."""
    wide = max(16, *(len(name) for name in result["methods"]))
    lines = [
        f"{result['directory']}: {verdict(result)}",
        f"{result['model']} on {result['dataset']}, n = {result['n']} clean images, seed {result['seed']}",
        f"{'method':{wide}s}{'says':>10s}{'class':>14s}{'score':>9s}{'seconds':>9s}",
    ]
    for name, own in result["methods"].items():
        says = "poisoned" if own["poisoned"] else "clean"
        score = "-" if own["score"] is None else f"{own['score']:.2f}"
        label = class_of(result, own["target"])
        lines.append(f"{name:{wide}s}{says:>10s}{label:>14s}{score:>9s}{own['seconds']:>9.1f}")
    lines.append("class: the one that the method finds most suspicious, whatever it says of the model.")
    lines.append("score: of that class; each method has a scale of its own. seconds: without compiling.")
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> str:
    """One sentence."""
    if not result["poisoned"]:
        alone = [name for name, own in result["methods"].items() if own["poisoned"]]
        doubt = f"; {', '.join(alone)} accused classes that no other did" if alone else ""
        return f"no agreed sign of a backdoor, by {len(result['methods'])} methods{doubt} (no proof that there is none)"
    accusers = ", ".join(result["accused_by"])
    return f"suspected of a backdoor towards class {class_of(result, result['target'])}, by {accusers}"


def draw(result: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> Path:
    """Write a PNG: a row for each method that recovered something.

    Args:
      arrays: as `bdjax.pipelines.audit.audit` gives them.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    rows = recovered(result, arrays)
    figure, axes = plt.subplots(len(rows), 8, figsize=(9, 1.35 * len(rows) + 0.5), squeeze=False, layout="constrained")
    for line, (name, images, titles) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image, title in zip(line, images, titles, strict=False):
            axis.imshow(np.repeat(image, 3, -1) if image.shape[-1] == 1 else image, vmin=0, vmax=1)
            axis.set_title(title, fontsize=7, parse_math=False)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    figure.suptitle(verdict(result), fontsize=9, parse_math=False)
    figure.savefig(remove_symlink(path), dpi=130)
    plt.close(figure)
    return path


def recovered(result: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[tuple[str, list[np.ndarray], list[str]]]:
    """("clean", ..) and each method that recovered something: its name, at most 8 images [h, w, C] in [0, 1], titles.

    Args: arrays: "clean" [n, H, W, C]; "METHOD/recovered" [k, h, w, C] with "METHOD/recovered_labels" [k], of which the
    most suspicious classes are taken; "METHOD/perturbation" [n, H, W, C], the first of which is shown.
    """
    rows = [("clean", list(_unit(arrays["clean"]))[:8], [""] * 8)]
    for name in result["methods"]:
        if f"{name}/recovered" in arrays:
            found, labels = arrays[f"{name}/recovered"], arrays[f"{name}/recovered_labels"]
            suspicion = [result["methods"][name]["classes"][label] for label in labels]
            order = np.argsort([np.inf if value is None else -value for value in suspicion], kind="stable")[:8]
            titles = [f"→ {class_of(result, int(labels[i]))}" for i in order]
            rows.append((name, [np.clip(found[i], 0, 1) for i in order], titles))
        if f"{name}/perturbation" in arrays:
            delta = np.asarray(arrays[f"{name}/perturbation"])[0]
            scaled = np.clip(0.5 + delta / (2 * max(float(np.abs(delta).max()), 1e-12)), 0, 1)
            moved = [np.clip(image + delta, 0, 1) for image in rows[0][1][:7]]
            rows.append((name, [scaled, *moved], ["δ, scaled", *["image + δ"] * len(moved)]))
    return rows


def _unit(images: np.ndarray) -> np.ndarray:
    return images / np.float32(255) if images.dtype == np.uint8 else images


def class_of(result: dict[str, Any], label: int) -> str:
    """A class by its number, and its name where it has another one."""
    name = result["classes"][label]
    return str(label) if name == str(label) else f"{label} ({name})"
