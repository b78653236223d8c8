"""One cell of a sweep in a process of its own (what `sweep` starts; not for people)."""

from pathlib import Path

from bdjax.cli._common import prepare_jax

ORDER = 110
USAGE = ""
SUMMARY = ""


def main(argv: list[str]) -> None:
    """FILE INDEX SEED OUT DEVICES."""
    from bdjax.pipelines import sweep

    file, index, seed, out, devices = argv
    prepare_jax()
    sweep.run_cell(Path(file), int(index), int(seed), Path(out), int(devices))
