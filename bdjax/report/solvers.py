"""A comparison of hypergradient solvers as a table for a terminal and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

_COLUMNS = (  # heading, key, format
    ("cos", "cosine", "{:.4f}"),
    ("rel err", "relative_error", "{:.2e}"),
    ("cos ind", "cosine_indirect", "{:.4f}"),
    ("err ind", "relative_error_indirect", "{:.2e}"),
    ("HVPs", "products", "{:d}"),
    ("residual", "residual", "{:.2e}"),
    ("seconds", "seconds", "{:.3f}"),
    ("MiB", "peak_memory_bytes", "{:.0f}"),
    ("ACC", "acc", "{:.2f}"),
    ("ASR", "asr", "{:.2f}"),
)
_SCALE = {"peak_memory_bytes": 2**-20, "acc": 100.0, "asr": 100.0}


def table(result: dict[str, Any]) -> str:
    """The comparison as text: errors against the reference, cost, and rates in percent after one round of I-BAU."""
    problem, reference = result["problem"], result["problem"]["reference"]
    facts = f"{reference['method']}, residual {reference['residual']:.1e}"
    if "eigenvalue_min" in reference:
        facts += (
            f"; eigenvalues of H {reference['eigenvalue_min']:.3g} to {reference['eigenvalue_max']:.3g}, "
            f"{reference['negative_eigenvalues']} of {problem['dimension']} negative, "
            f"condition {reference['condition']:.1e}"
        )
    before = result["before"]
    lines = [
        f"{result['attack']} on {result['dataset']}, {result['model']}, seed {result['seed']}: "
        f"the first θ step of I-BAU, δ of {problem['dimension']} values, norm {problem['perturbation_norm']:.3g}",
        f"H of {problem['n_hessian']} images, E of {problem['n_outer']}. Reference: {facts}",
        f"before: ACC {100 * before['acc']:.2f} (n = {result['n_test']}), ASR {100 * before['asr']:.2f} "
        f"(n = {result['n_asr']}); {result['env']['device']} x {result['env']['devices']}",
        "",
        f"{'solver':16s}{'K':>4s}" + "".join(f"{heading:>10s}" for heading, _, _ in _COLUMNS),
    ]
    for row in result["rows"]:
        cells = [_cell(row.get(key), key, form) for _, key, form in _COLUMNS]
        lines.append(f"{row['solver']:16s}{row['iterations']:4d}" + "".join(f"{cell:>10s}" for cell in cells))
    lines += [
        "",
        "cos, rel err: the whole hypergradient against the reference; ind: its indirect term alone. HVPs: products",
        "with H, at most (cg, normal_cg, gmres, bicgstab stop early once converged). seconds: median, compilation",
        "apart. MiB: the program's temporaries and outputs. ACC, ASR: % after one round of I-BAU with that solver.",
    ]
    notes = [f"{row['solver']}, K = {row['iterations']}: {row['round']}" for row in result["rows"] if _failed(row)]
    return "\n".join([*lines, *notes])


def draw(result: dict[str, Any], path: Path) -> Path:
    """Write a PNG: error against products, and ACC and ASR after one round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["solver"] for row in result["rows"]))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    cleaned = [row for row in result["rows"] if row.get("acc") is not None]
    figure, axes = plt.subplots(
        1, 2 if cleaned else 1, figsize=(12 if cleaned else 7, max(4.6, 0.24 * len(cleaned) + 1.6)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    axis = axes[0, 0]
    for number, name in enumerate(names):
        rows = [row for row in result["rows"] if row["solver"] == name]
        x = [max(row["products"], 0) for row in rows]
        y = [np.clip(row["relative_error_indirect"], 1e-8, 1e8) for row in rows]
        axis.plot(x, y, marker="os^Dv"[number % 5], color=colours[name], label=name, markersize=5, linewidth=1)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(
        yscale="log", xlabel="products with H (at most)",
        ylabel="relative error of the indirect term (1: as wrong as leaving it away)",
    )  # fmt: skip
    axis.set_xscale("symlog")
    axis.legend(fontsize=7, ncol=2)
    problem = result["problem"]
    axis.set_title(
        f"{result['attack']} on {result['dataset']} ({result['model']}), seed {result['seed']}, "
        f"{problem['n_hessian']} images in H",
        fontsize=9,
    )
    if cleaned:
        _bars(axes[0, 1], cleaned, result)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _bars(axis: Any, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    places = np.arange(len(rows))
    for shift, key, colour, label in ((-0.2, "acc", "tab:blue", "ACC"), (0.2, "asr", "tab:red", "ASR")):
        axis.barh(places + shift, [100 * row[key] for row in rows], 0.38, color=colour, label=label)
        axis.axvline(100 * result["before"][key], color=colour, linestyle="--", linewidth=1)
    axis.set_yticks(places, [f"{row['solver']}, K = {row['iterations']}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), xlabel="% after one round of I-BAU (dashed: before)")
    axis.set_title(f"n = {result['n_test']} clean, {result['n_asr']} triggered", fontsize=9)
    axis.legend(fontsize=8)


def _cell(value: Any, key: str, form: str) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    return form.format(value * _SCALE[key] if key in _SCALE else value)


def _failed(row: dict[str, Any]) -> bool:
    return row.get("round", "finished") != "finished"
