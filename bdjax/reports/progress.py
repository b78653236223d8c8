"""A progress bar with the remaining time, on a terminal's stderr or in a notebook; silent elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Tick = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in total)."""
_DELAY = 1.0  # seconds that a stage lasts before its bar appears


@contextlib.contextmanager
def bar() -> Iterator[Tick]:
    """Provide a function `tick(stage, done, total)` that draws one bar per stage while the block runs."""
    notebook = "ipykernel" in sys.modules
    if not (notebook or sys.stderr.isatty()):
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=not notebook, force_jupyter=notebook or None), transient=True)
    tasks: dict[str, int] = {}
    start_times: dict[str, float] = {}

    def tick(stage: str, done: int, total: int) -> None:
        start_time = start_times.setdefault(stage, time.monotonic())
        if stage not in tasks and time.monotonic() - start_time > _DELAY:
            for task in list(tasks.values()):
                progress.remove_task(task)  # type: ignore[arg-type]
            tasks.clear()
            tasks[stage] = progress.add_task(stage, total=total)
        if stage in tasks:
            progress.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

    with progress:
        yield tick
