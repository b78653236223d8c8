"""The picture of a run: what was planted, what was found, and how accuracy and ASR went."""

from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink


def draw(result: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> Path:
    """Write a PNG: clean and triggered images, what the defense found, ACC and ASR by round.

    Args: result: a result.json; arrays: its arrays.npz ("clean", "triggered" [n, H, W, C]; "perturbation_first"
    [1, H, W, C] and "recovered" [n, h, w, C] where the defense has them).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    clean, triggered = _unit(arrays["clean"]), _unit(arrays["triggered"])
    labels, count = arrays["labels"], len(clean)
    perturbation = arrays.get("perturbation_first")
    recovered = arrays.get("recovered", np.zeros(0))
    rows = 2 + (perturbation is not None) + (len(recovered) > 0)
    figure = plt.figure(figsize=(11, 1.45 * rows + 0.5), layout="constrained")
    left, right = np.ravel(figure.subfigures(1, 2, width_ratios=(1.25, 1)))
    axes = left.subplots(rows, count, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for column in range(count):
        _show(axes[0, column], clean[column])
        axes[0, column].set_title(f"class {labels[column]}", fontsize=8)
        _show(axes[1, column], triggered[column])
    axes[0, 0].set_ylabel("clean", fontsize=9)
    axes[1, 0].set_ylabel("triggered", fontsize=9)
    if perturbation is not None:
        delta = perturbation[0]
        peak = float(np.abs(delta).max()) or 1.0
        _show(axes[2, 0], 0.5 + delta / (2 * peak))
        axes[2, 0].set_ylabel("learned", fontsize=9)
        axes[2, 0].set_title(f"δ, round 1, ±{peak:.2g}", fontsize=8)
        for column in range(1, count):
            _show(axes[2, column], np.clip(clean[column] + delta, 0, 1))
            axes[2, column].set_title("image + δ", fontsize=8)
    if len(recovered):
        _recovered(axes[-1], clean[0], triggered[0], recovered, arrays.get("recovered_labels"))
    _curve(right.subplots(), result)
    figure.savefig(remove_symlink(path), dpi=130)
    plt.close(figure)
    return path


def _recovered(axes: Any, clean: np.ndarray, triggered: np.ndarray, found: np.ndarray, labels: Any) -> None:
    """A row: what the true trigger changes, then the triggers that were found; differences on grey, scaled to fit.

    Beside patches the true one is cut out of the image, for it is as small.
    """
    change = triggered - clean
    if found.shape[1:] == clean.shape:
        shown = [0.5 + image / (2 * (float(np.abs(image).max()) or 1.0)) for image in (change, *found)]
    else:
        touched = (change != 0).any(2)
        rows, columns = (np.flatnonzero(touched.any(axis)) for axis in (1, 0))
        cut = [slice(at[0], at[-1] + 1) if len(at) else slice(None) for at in (rows, columns)]
        shown = [triggered[cut[0], cut[1]], *found]
    _show(axes[0], shown[0])
    axes[0].set_title("true", fontsize=8)
    axes[0].set_ylabel("recovered", fontsize=9)
    for place, (axis, image) in enumerate(zip(axes[1:], shown[1:], strict=False)):
        _show(axis, np.clip(image, 0, 1))
        if labels is not None:
            axis.set_title(f"→ {labels[place]}", fontsize=8)
    for axis in axes[1 + len(found) :]:
        axis.set_visible(False)


def _curve(axis: Any, result: dict[str, Any]) -> None:
    before, rounds = result["before"], result["rounds"]
    steps = [0] + [row["step"] for row in rounds]
    for name, label, colour in (("acc", "clean accuracy", "tab:blue"), ("asr", "attack success rate", "tab:red")):
        if before[name] is None:
            continue  # no trigger, no attack success rate
        values = [before[name]] + [row.get(name, np.nan) for row in rounds]
        axis.plot(steps, 100 * np.array(values), color=colour, label=label, marker="o", markersize=3)
    axis.set_ylim(-2, 102)
    axis.set_xlabel("round of the defense (0: the victim)")
    axis.set_ylabel("%")
    axis.grid(alpha=0.3)
    axis.legend(loc="center right", fontsize=8)
    axis.set_title(
        f"{result['attack']} on {result['dataset']} ({result['model']}), {result['defense']}, "
        f"n={result['n_test']}, seed {result['seed']}",
        fontsize=9,
    )


def _unit(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images


def _show(axis: Any, image: np.ndarray) -> None:
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image[..., :3], cmap="gray", vmin=0, vmax=1)
