"""Summaries of grids whose file of experiments defines `summarise` or `draw`: summary.md and figures.

Below the table stand what a reader needs to judge it: scale, numbers of images and cells, hardware and command.
"""

from collections.abc import Sequence
from pathlib import Path

from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import cells
from bdjax.pipelines.experiment_options import CellResult, Grid


def write_summary(grid: Grid, out: Path, seeds: Sequence[int]) -> None:
    """Write summary.md and the figures of the finished cells, as far as the file of experiments defines them.

    Args:
      grid: the loaded file.
      out: directory of its results.
      seeds: of the sweep.
    """
    results: list[CellResult] = []
    for cell in grid.cells:
        for seed in seeds:
            try:
                result = cells.read(cell, seed, out)
            except InputError:  # reported as a failed cell
                continue
            results += [] if result is None else [result]
    if not results:
        return
    if grid.summarise is not None:
        checkpoint.write_text(out / "summary.md", f"{grid.summarise(results)}\n{_notes(grid, results, seeds)}")
    if grid.draw is not None:
        grid.draw(results, out)


def _notes(grid: Grid, results: Sequence[CellResult], seeds: Sequence[int]) -> str:
    """Lines below a summary: scale, numbers of images and seeds, hardware, command."""
    scales = dict.fromkeys(result.cell.scale for result in results if result.cell.scale)
    images = sorted({result.result["n_test"] for result in results})
    triggered = sorted({result.result["n_asr"] for result in results})
    hardware = dict.fromkeys(f"{r.result['env']['device']} x {r.result['env']['devices']}" for r in results)
    software = dict.fromkeys(f"bdjax {r.result['env']['bdjax']}, jax {r.result['env']['jax']}" for r in results)
    missing = len(grid.cells) * len(seeds) - len(results)
    lines = [
        f"Scale: {'; '.join(scales) or 'the published one'}.",
        f"n = {_range(images)} clean test images (ACC), {_range(triggered)} triggered ones (ASR); "
        f"{len(results)} finished cells{f', {missing} missing' if missing else ''}.",
        f"Hardware: {', '.join(hardware)}; {', '.join(software)}.",
        f"Made by: `{grid.command(seeds)}`",
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _range(numbers: Sequence[int]) -> str:
    """Ascending numbers as their range."""
    return "-".join(f"{number:,}" for number in dict.fromkeys((numbers[0], numbers[-1])))
