"""Results of `bdjax bench` as text, one line per workload, and as a Markdown table."""

from collections.abc import Mapping
from typing import Any

HEADING = (
    f"{'workload':36s}{'seconds (min to max)':>28s}{'rate':>12s}{'GFLOP':>9s}{'of peak':>9s}{'GB':>8s}{'of band':>9s}"
    f"{'MiB':>8s}{'compile':>9s}{'cached':>8s}"
)


def line(row: Mapping[str, Any]) -> str:
    """One workload's numbers under `HEADING`; a dash stands for a missing number."""
    if "failed" in row:
        return f"{row['name']:36s}failed: {row['failed']}"
    seconds = f"{row['median']:.4g} ({min(row['seconds']):.4g} to {max(row['seconds']):.4g})"
    flops, moved_bytes = row.get("flops") or 0, row.get("bytes") or 0
    cells = [  # width, text, whether there is such a number
        (12, f"{row['rate']:.4g}/s", row["rate"]),
        (9, f"{flops / 1e9:.3g}", flops),
        (9, f"{share(row, 'flops'):.1%}", flops),
        (8, f"{moved_bytes / 1e9:.3g}", moved_bytes),
        (9, f"{share(row, 'bytes'):.1%}", moved_bytes),
        (8, f"{row.get('peak_memory_bytes', 0) / 2**20:.0f}", row.get("peak_memory_bytes")),
        (9, f"{row.get('compile', row.get('cold', 0)):.2f}", True),
        (8, f"{row.get('compile_cached', 0):.2f}", "compile_cached" in row),
    ]
    texts = "".join(f"{text if exists else '-':>{width}s}" for width, text, exists in cells)
    return f"{row['name']:36s}{seconds:>28s}{texts}"


def markdown(result: Mapping[str, Any]) -> str:
    """The workloads as a Markdown table, followed by the notes.

    Beside the measured time stand two lower bounds of it: the time that the workload's operations take at the machine's
    peak rate, and the time that its bytes take at its bandwidth.
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
        for quantity in ("flops", "bytes"):
            count = row.get(quantity)
            cells += [f"{count / 1e9:.3g}", f"{count / row[f'peak_{quantity}']:.3g}"] if count else ["-", "-"]
        cells += [f"{row[key]:.2f}" if key in row else "-" for key in ("compile", "compile_cached")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join([*lines, *notes(result).splitlines()])


def share(row: Mapping[str, Any], quantity: str) -> float:
    """Rate of `quantity` ("flops" or "bytes") as a fraction of the machine's peak rate; 0 where it was not counted."""
    peak = row.get(f"peak_{quantity}")
    return row[quantity] / row["median"] / peak if peak and row.get(quantity) else 0.0


def notes(result: Mapping[str, Any]) -> str:
    """What the columns mean, and on which machine they were measured."""
    measured = [row for row in result["rows"] if "peak_flops" in row]
    env = result["env"]
    machine = (
        f"{env['device']} x {env['devices']}, {env['cores']} cores, jax {env['jax']}" if env else "no workload ran"
    )
    kinds = sorted({row["peak_flops_of"] for row in measured})
    peaks = {kind: max(row["peak_flops"] for row in measured if row["peak_flops_of"] == kind) / 1e9 for kind in kinds}
    lines = [
        "",
        f"{machine}; {'XLA_FLAGS ' + result['xla_flags'] if result['xla_flags'] else 'no XLA_FLAGS'}",
        f"seconds: median of n = {result['rows'][0].get('n', 0) if result['rows'] else 0} runs after a first one.",
        "of peak: XLA's operation count per second, as a share of the machine's best rate: " + "; ".join(
            f"{kind} ({value:.0f} GFLOP/s)" for kind, value in peaks.items()
        ),
        "of band: bytes of the optimised program per second, as a share of the rate of adding one to a large array"
        + (f" ({max(row['peak_bytes'] for row in measured) / 1e9:.1f} GB/s)" if measured else "")
        + "; above 100 % where caches help.",
        "MiB: " + ("; ".join(sorted({row["peak_memory_of"] for row in measured})) or "-"),
        "compile, cached: seconds to trace and compile, with an empty and a filled cache; startup: first start.",
    ]  # fmt: skip
    if result["small"]:
        lines.append("These are tiny sizes: the numbers mean nothing.")
    return "\n".join(lines)
