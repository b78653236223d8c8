"""How well the trigger-free estimate follows the true attack success rate: a scatter plot and Spearman's rho.

    python experiments/foreign/estimate.py rows-500.json rows-100.json --out experiments/results/foreign

reads what bench.py wrote and writes estimate.png and estimate.json: every run is a point, all victims and defenses.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from scipy.stats import spearmanr


def main() -> None:
    """Read the rows, write the figure and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/foreign"))
    options = parser.parse_args()
    rows = [row for path in options.rows for row in json.loads(path.read_text()) if row.get("estimate")]
    estimated, true = ([100 * row["estimate"]["rate"] for row in rows], [row["after_asr"] for row in rows])
    rho = spearmanr(estimated, true)
    calm = [row["after_asr"] for row in rows if row["estimate"]["rate"] <= 0.1]
    facts = {
        "n": len(rows),
        "victims": len({row["victim"] for row in rows}),
        "defenses": sorted({row["defense"] for row in rows}),
        "spearman": float(rho.statistic),
        "p": float(rho.pvalue),
        "estimate_at_most_10": len(calm),
        "of_these_asr_at_most_20": sum(asr <= 20 for asr in calm),
    }
    (options.out / "estimate.json").write_text(json.dumps(facts, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(4.5, 4.2), layout="constrained")
    for defense in facts["defenses"]:
        own = [i for i, row in enumerate(rows) if row["defense"] == defense]
        axes.scatter([estimated[i] for i in own], [true[i] for i in own], s=18, label=defense, alpha=0.7)
    axes.plot([0, 100], [0, 100], lw=0.8, color="grey")
    axes.set(xlabel="estimate without the trigger, %", ylabel="true ASR after the defense, %")
    title = f"Spearman's rho {facts['spearman']:.2f}, n = {facts['n']} runs of {facts['victims']} victims"
    axes.set_title(title, size=9)
    axes.legend(fontsize=7)
    figure.savefig(options.out / "estimate.png", dpi=140)


if __name__ == "__main__":
    main()
