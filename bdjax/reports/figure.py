"""The figure of a run: clean and triggered images, recovered triggers, and the curves of accuracy and ASR."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.io.files import remove_symlink


def draw(result: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: Path) -> Path:
    """Write a PNG: clean and triggered images, the triggers that the defense recovered, ACC and ASR by round.

    Args:
      result: content of a result.json.
      arrays: of its arrays.npz: "clean" and "triggered" [n, H, W, C], "labels" [n]; "perturbation_first" [1, H, W, C],
        "recovered" [k, h, w, C] and "recovered_labels" [k] where the defense has them.
      path: file to write.

    Returns:
      `path`.
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
    left_half, right_half = np.ravel(figure.subfigures(1, 2, width_ratios=(1.25, 1)))
    axes = left_half.subplots(rows, count, squeeze=False)
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
        _draw_recovered(axes[-1], clean[0], triggered[0], recovered, arrays.get("recovered_labels"))
    _draw_curves(right_half.subplots(), result)
    figure.savefig(remove_symlink(path), dpi=130)
    plt.close(figure)
    return path


def _draw_recovered(axes: Any, clean: np.ndarray, triggered: np.ndarray, recovered: np.ndarray, labels: Any) -> None:
    """Draw a row: the effect of the true trigger, then the recovered triggers.

    Recovered perturbations of a whole image are compared with the difference of the images, scaled and on grey;
    recovered patches with the part of the triggered image that the trigger changes.
    """
    change = triggered - clean
    if recovered.shape[1:] == clean.shape:
        images = [0.5 + image / (2 * (float(np.abs(image).max()) or 1.0)) for image in (change, *recovered)]
    else:
        changed = (change != 0).any(2)
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        box = [slice(at[0], at[-1] + 1) if len(at) else slice(None) for at in (rows, columns)]
        images = [triggered[box[0], box[1]], *recovered]
    _show(axes[0], images[0])
    axes[0].set_title("true", fontsize=8)
    axes[0].set_ylabel("recovered", fontsize=9)
    for number, (axis, image) in enumerate(zip(axes[1:], images[1:], strict=False)):
        _show(axis, np.clip(image, 0, 1))
        if labels is not None:
            axis.set_title(f"→ {labels[number]}", fontsize=8)
    for axis in axes[1 + len(recovered) :]:
        axis.set_visible(False)


def _draw_curves(axis: Any, result: Mapping[str, Any]) -> None:
    """Draw clean accuracy and attack success rate over the rounds of the defense."""
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
    """Images as float32; uint8 ones are scaled to [0, 1]."""
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images


def _show(axis: Any, image: np.ndarray) -> None:
    """Draw an image [h, w, C] with values in [0, 1]; one channel is drawn in grey."""
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image[..., :3], cmap="gray", vmin=0, vmax=1)
