"""Tables: one run for a terminal; a directory of runs as mean, std and n beside the papers' numbers."""

from typing import Any


def one(result: dict[str, Any]) -> str:
    """A run's numbers for a terminal: rates in percent, n, seconds with compilation apart, peak memory."""
    seconds, before, after = result["seconds"], result["before"], result["after"]
    rows = [
        f"{result['attack']} -> {result['defense']} on {result['dataset']}, {result['model']}, seed {result['seed']}",
        "",
        f"{'':26s}{'before':>9s}{'after':>9s}",
        f"{'clean accuracy, %':26s}{100 * before['acc']:9.2f}{100 * after['acc']:9.2f}   n = {result['n_test']}",
        f"{'attack success rate, %':26s}{100 * before['asr']:9.2f}{100 * after['asr']:9.2f}   n = {result['n_asr']}",
        "",
        f"seconds: attack {seconds['attack']:.1f}, defense {seconds['defense']:.1f}, compilation {seconds['compile']:.1f}",
        f"peak memory: {result['peak_memory_bytes'] / 2**20:.0f} MiB ({result['peak_memory_of']}), "
        f"{result['env']['device']} x {result['env']['devices']}",
        f"defender's clean images: {result['n_defender']}",
    ]
    return "\n".join(rows)
