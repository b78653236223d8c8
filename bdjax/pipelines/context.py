"""How a run is carried out: devices, progress, what is measured. None of it changes a model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Context:
    """How a run is carried out; none of it changes a model."""

    devices: int = 0
    """Local devices to use, 0 for all."""
    tick: Callable[[str, int, int], None] = field(default=lambda stage, done, total: None)
    """Progress: called with the stage, the steps done and the steps in all."""
    estimate: bool = False
    """Estimate the attack success rate without the trigger after each defense; the commands do by default."""
    measured: int = 0
    """Largest number of held-out images that rates are measured on, drawn at random; 0: all. The result says n."""
    store: Path | None = None
    """Directory of victims by hash, where a clean model that an attack starts from is kept and found again."""
    say: Callable[[str], None] = field(default=lambda line: None)
    """Called with what a user should know about the data before a long training, one line each."""

    def waiting(self) -> None:
        """Show that another process makes the same result and this one waits for it."""
        self.tick("waiting for another process that makes the same", 0, 1)
