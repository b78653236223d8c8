"""How well the trigger-free estimate follows the true attack success rate: a scatter plot and Spearman's rho."""

import json
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import spearmanr

from bdjax.pipelines.experiment_options import CellResult


def draw(results: Sequence[CellResult], folder: Path) -> None:
    """Write estimate.png and estimate.json: every run with an estimate is a point, all victims and defenses.

    Args:
      results: finished cells, at least two with an estimate.
      folder: where they go.
    """
    from matplotlib import pyplot as plt

    runs = [(result, result.result) for result in results if result.result["estimate"]]
    estimated = [100 * run["estimate"]["rate"] for _, run in runs]
    true = [100 * run["after"]["asr"] for _, run in runs]
    rho = spearmanr(estimated, true)
    calm = [asr for rate, asr in zip(estimated, true, strict=True) if rate <= 10]
    defenses = sorted({run["defense"] for _, run in runs})
    facts = {
        "n": len(runs),
        "victims": len({result.cell.label.split(", ")[1] for result, _ in runs}),
        "defenses": defenses,
        "spearman": float(rho.statistic),
        "p": float(rho.pvalue),
        "estimate_at_most_10": len(calm),
        "of_these_asr_at_most_20": sum(asr <= 20 for asr in calm),
    }
    (folder / "estimate.json").write_text(json.dumps(facts, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(4.5, 4.2), layout="constrained")
    for defense in defenses:
        chosen = [i for i, (_, run) in enumerate(runs) if run["defense"] == defense]
        axes.scatter([estimated[i] for i in chosen], [true[i] for i in chosen], s=18, label=defense, alpha=0.7)
    axes.plot([0, 100], [0, 100], lw=0.8, color="grey")
    axes.set(xlabel="estimate without the trigger, %", ylabel="true ASR after the defense, %")
    title = f"Spearman's rho {facts['spearman']:.2f}, n = {facts['n']} runs of {facts['victims']} victims"
    axes.set_title(title, size=9)
    axes.legend(fontsize=7)
    figure.savefig(folder / "estimate.png", dpi=140)
    plt.close(figure)
