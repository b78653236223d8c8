"""A progress bar with the time left, on stderr; silent when that is not a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Tick = Callable[[str, int, int], None]
_PATIENCE = 1.0  # seconds before a bar is worth showing


@contextlib.contextmanager
def bar() -> Iterator[Tick]:
    """A function `tick(stage, done, total)` that draws one line a stage while the block runs."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, int] = {}
    began: dict[str, float] = {}

    def tick(stage: str, done: int, total: int) -> None:
        started = began.setdefault(stage, time.monotonic())
        if stage not in tasks and time.monotonic() - started > _PATIENCE:
            for old in list(tasks.values()):
                progress.remove_task(old)  # type: ignore[arg-type]
            tasks.clear()
            tasks[stage] = progress.add_task(stage, total=total)
        if stage in tasks:
            progress.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

    with progress:
        yield tick
