"""A comparison of hypergradient solvers as a table for a terminal, as a figure and as Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import hypergrad
from bdjax.io.files import remove_symlink

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
_SUMMARY = (  # heading, key, factor, format
    ("cosine", "cosine", 1, ".3f"),
    ("relative error", "relative_error", 1, ".2g"),
    ("error of indirect term", "relative_error_indirect", 1, ".2g"),
    ("residual", "residual", 1, ".2g"),
    ("seconds", "seconds", 1, ".3f"),
    ("MiB", "peak_memory_bytes", 2**-20, ".0f"),
    ("ACC after", "acc", 100, ".1f"),
    ("ASR after", "asr", 100, ".1f"),
)
_SCALE = {"peak_memory_bytes": 2**-20, "acc": 100.0, "asr": 100.0}


def table(result: Mapping[str, Any]) -> str:
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
        f"before: ACC {100 * before['acc']:.2f} (n = {result['n_test']}), ASR {_cell(before['asr'], 'asr', '{:.2f}')} "
        f"(n = {result['n_asr']}); {result['env']['device']} x {result['env']['devices']}",
        "",
        f"{'solver':16s}{'K':>4s}" + "".join(f"{heading:>10s}" for heading, _, _ in _COLUMNS),
    ]
    for row in result["rows"]:
        cells = [_cell(row.get(key), key, form) for _, key, form in _COLUMNS]
        lines.append(f"{row['solver']:16s}{_count(row) or '–':>4}" + "".join(f"{cell:>10s}" for cell in cells))
    lines += [
        "",
        "cos, rel err: of the hypergradient, against the reference; ind: of its indirect term alone. HVPs: products",
        "with H, at most (cg, normal_cg, gmres, bicgstab stop early once converged). seconds: median, without",
        "compilation. MiB: the program's temporaries and outputs. ACC, ASR: % after one round of I-BAU with it.",
    ]
    notes = [f"{row['solver']}, K = {row['iterations']}: {row['round']}" for row in result["rows"] if _failed(row)]
    return "\n".join([*lines, *notes])


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG: error over seconds, and ACC and ASR after one round of I-BAU. Returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["solver"] for row in result["rows"]))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    measured = [row for row in result["rows"] if row.get("acc") is not None]
    figure, axes = plt.subplots(
        1, 2 if measured else 1, figsize=(12 if measured else 7, max(4.6, 0.24 * len(measured) + 1.6)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    axis = axes[0, 0]
    for number, name in enumerate(names):
        rows = [row for row in result["rows"] if row["solver"] == name]
        x = [row["seconds"] for row in rows]
        y = [np.clip(row["relative_error_indirect"], 1e-8, 1e8) for row in rows]
        axis.plot(x, y, marker="os^Dv"[number % 5], color=colours[name], label=name, markersize=6, linewidth=1)
        for row, point in zip(rows, zip(x, y, strict=True), strict=True):
            if count := _count(row):
                axis.annotate(count, point, xytext=(4, 3), textcoords="offset points", fontsize=6)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="seconds of one hypergradient (numbers at the marks: K)")
    axis.set_ylabel("relative error of the indirect term\n(dotted: error of leaving it out)", fontsize=8)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.5), max(high, 2))
    axis.legend(fontsize=7, ncol=2)
    problem = result["problem"]
    axis.set_title(
        f"{result['attack']} on {result['dataset']} ({result['model']}), seed {result['seed']}, "
        f"{problem['n_hessian']} images in H",
        fontsize=9,
    )
    if measured:
        _draw_rates(axes[0, 1], measured, result)
    figure.savefig(remove_symlink(path), dpi=130)
    plt.close(figure)
    return path


def _draw_rates(axis: Any, rows: list[dict[str, Any]], result: Mapping[str, Any]) -> None:
    """Draw ACC and ASR after one round with each solver as bars."""
    positions = np.arange(len(rows))
    for shift, key, colour, label in ((-0.2, "acc", "tab:blue", "ACC"), (0.2, "asr", "tab:red", "ASR")):
        if result["before"][key] is None:
            continue  # no trigger, no attack success rate
        axis.barh(positions + shift, [100 * row[key] for row in rows], 0.38, color=colour, label=label)
        axis.axvline(100 * result["before"][key], color=colour, linestyle="--", linewidth=1)
    axis.set_yticks(positions, [f"{row['solver']}, K = {row['iterations']}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), xlabel="% after one round of I-BAU (dashed: before)")
    axis.set_title(f"n = {result['n_test']} clean, {result['n_asr']} triggered", fontsize=9)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.09), ncol=2, frameon=False)


def _count(row: Mapping[str, Any]) -> str:
    """K as text, "" for a solver that does not iterate."""
    return str(row["iterations"]) if hypergrad.iterates(row["solver"].partition(":")[0]) else ""


def _cell(value: Any, key: str, form: str) -> str:
    """A number in the unit of its column; a dash where there is none."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    return form.format(value * _SCALE[key] if key in _SCALE else value)


def _failed(row: Mapping[str, Any]) -> bool:
    """Whether the round of I-BAU with this solver did not finish."""
    return row.get("round", "finished") != "finished"


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """Several comparisons as Markdown: mean ± std over the seeds of each data set and attack, with n."""
    lines = []
    for dataset, attack in sorted({(result["dataset"], result["attack"]) for result in results}):
        lines += _group_lines([r for r in results if (r["dataset"], r["attack"]) == (dataset, attack)])
    env = results[0]["env"]
    hardware = f"Hardware: {env['device']} x {env['devices']}. Seconds are medians of 3, without compilation."
    return "\n".join([*lines, hardware, ""])


def _group_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Heading, problem and table of the comparisons of one data set and attack."""
    first, problem = results[0], results[0]["problem"]
    references = [r["problem"]["reference"] for r in results]
    acc, asr = (
        _mean_std([np.nan if r["before"][k] is None else 100 * r["before"][k] for r in results]) for k in ("acc", "asr")
    )
    lines = [
        f"### {first['attack']} on {first['dataset']} ({first['model']}), {len(results)} seeds: "
        f"{[r['seed'] for r in results]}",
        "",
        f"Before: ACC {acc}, ASR {asr} (n = {first['n_test']} and {' / '.join(str(r['n_asr']) for r in results)}). "
        f"H of {problem['n_hessian']} images, {problem['dimension']} values; reference {references[0]['method']}, "
        f"residual at most {max(r['residual'] for r in references):.0e}.",
    ]
    if all("eigenvalue_min" in r for r in references):
        lines.append(
            f"Eigenvalues of H {_mean_std([r['eigenvalue_min'] for r in references])} to "
            f"{_mean_std([r['eigenvalue_max'] for r in references])}; negative "
            f"{' / '.join(str(r['negative_eigenvalues']) for r in references)}; condition "
            f"{' / '.join(format(r['condition'], '.0e') for r in references)}; max abs(1 - 0.1 λ) "
            f"{_mean_std([r['contraction'] for r in references])}."
        )
    lines += ["", "| solver | K | HVPs | " + " | ".join(heading for heading, *_ in _SUMMARY) + " |"]
    lines += ["|---|--:|--:|" + "--:|" * len(_SUMMARY)]
    for row in first["rows"]:
        same_solver = [
            r for result in results for r in result["rows"]
            if (r["solver"], r["iterations"]) == (row["solver"], row["iterations"])
        ]  # fmt: skip
        cells = [
            _mean_std([r[key] * scale for r in same_solver if r.get(key) is not None], form)
            for _, key, scale, form in _SUMMARY
        ]
        lines.append(f"| {row['solver']} | {_count(row) or '–'} | {row['products']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _mean_std(values: list[float], form: str = ".3g") -> str:
    """Mean ± sample standard deviation of the finite values; a dash without any."""
    values = [v for v in values if np.isfinite(v)]
    if not values:
        return "–"
    text = format(np.mean(values), form)
    return f"{text} ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else text
