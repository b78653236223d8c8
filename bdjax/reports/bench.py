"""`bdjax bench` as lines of text, one a workload."""

from typing import Any

HEADING = (
    f"{'workload':36s}{'seconds (min to max)':>28s}{'rate':>12s}{'GFLOP':>9s}{'of peak':>9s}{'GB':>8s}{'of band':>9s}"
    f"{'MiB':>8s}{'compile':>9s}{'cached':>8s}"
)


def line(row: dict[str, Any]) -> str:
    """One workload; what it has no number for is a dash."""
    if "failed" in row:
        return f"{row['name']:36s}failed: {row['failed']}"
    seconds = f"{row['median']:.4g} ({min(row['seconds']):.4g} to {max(row['seconds']):.4g})"
    flops, moved = row.get("flops") or 0, row.get("bytes") or 0
    cells = [
        (12, f"{row['rate']:.4g}/s", row["rate"]),
        (9, f"{flops / 1e9:.3g}", flops),
        (9, f"{share(row, 'flops'):.1%}", flops),
        (8, f"{moved / 1e9:.3g}", moved),
        (9, f"{share(row, 'bytes'):.1%}", moved),
        (8, f"{row.get('peak_memory_bytes', 0) / 2**20:.0f}", row.get("peak_memory_bytes")),
        (9, f"{row.get('compile', row.get('cold', 0)):.2f}", True),
        (8, f"{row.get('compile_cached', 0):.2f}", "compile_cached" in row),
    ]
    return f"{row['name']:36s}{seconds:>28s}" + "".join(f"{cell if there else '-':>{n}s}" for n, cell, there in cells)


def markdown(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, with the two numbers that no program is below: what its operations take at the
    machine's peak, and what its bytes take at its bandwidth.
    """
    lines = [
        "| workload | n | seconds | rate | GFLOP | at peak, s | GB | at bandwidth, s | compile, s | cached, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        if "failed" in row:
            continue
        seconds = f"{row['median']:.3g} ({min(row['seconds']):.3g} to {max(row['seconds']):.3g})"
        cells = [str(row["n"]), seconds, f"{row['rate']:.4g} {row['unit']}/s"]
        for what in ("flops", "bytes"):
            counted = row.get(what)
            cells += [f"{counted / 1e9:.3g}", f"{counted / row[f'peak_{what}']:.3g}"] if counted else ["-", "-"]
        cells += [f"{row[key]:.2f}" if key in row else "-" for key in ("compile", "compile_cached")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join([*lines, *notes(result).splitlines()])


def share(row: dict[str, Any], what: str) -> float:
    """`what` ("flops" or "bytes") a second, as a part of what the machine did in the same process; 0 if not counted."""
    peak = row.get(f"peak_{what}")
    return row[what] / row["median"] / peak if peak and row.get(what) else 0.0


def notes(result: dict[str, Any]) -> str:
    """What the columns mean, and where they were measured."""
    measured = [row for row in result["rows"] if "peak_flops" in row]
    env = result["env"]
    where = f"{env['device']} x {env['devices']}, {env['cores']} cores, jax {env['jax']}" if env else "no workload ran"
    peaks = sorted({row["peak_flops_of"] for row in measured})
    best = {kind: max(row["peak_flops"] for row in measured if row["peak_flops_of"] == kind) / 1e9 for kind in peaks}
    lines = [
        "",
        f"{where}; {'XLA_FLAGS ' + result['xla_flags'] if result['xla_flags'] else 'no XLA_FLAGS'}",
        f"n = {result['rows'][0].get('n', 0) if result['rows'] else 0} runs each after one that compiles, median.",
        "of peak: XLA's operations a second over the machine's best " + "; ".join(
            f"{kind} ({value:.0f} GFLOP/s)" for kind, value in best.items()
        ),
        "of band: bytes of the optimised program a second over those of adding one to a large array"
        + (f" ({max(row['peak_bytes'] for row in measured) / 1e9:.1f} GB/s)" if measured else "")
        + "; caches can make it more than all.",
        "MiB: " + ("; ".join(sorted({row["peak_memory_of"] for row in measured})) or "-"),
        "compile, cached: seconds of tracing and compiling, the cache empty and filled; of startup, the first start.",
    ]  # fmt: skip
    if result["small"]:
        lines.append("These are tiny sizes: the numbers mean nothing.")
    return "\n".join(lines)
