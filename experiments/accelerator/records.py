"""The record of a run: one JSON object a line, appended as soon as it is known."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIPPED = 3
"""Exit code of a step that cannot be done here; the last line of its log says why."""


class SkipStep(Exception):
    """This step cannot be done on this machine; the message says why."""


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line; it is whole or not there, whatever happens next to the process."""
    line = json.dumps(record, default=float) + "\n"
    with path.open("a") as file:
        file.write(line)
        file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file; a last line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@dataclass(frozen=True)
class Run:
    """What a step is given."""

    step: str
    """Its name."""
    file: Path
    """Where records go."""
    keep: Path
    """Directory of whatever else shall come back."""
    work: Path
    """Directory of what need not come back; the steps of a run share it."""
    images: str
    """A packed set (.npz of :mod:`accelerator.images`), a data set as `bdjax --dataset` takes it, or "" for none."""
    deadline: float
    """time.time() at which this step is stopped."""
    smoke: bool = False
    """Tiny sizes: the numbers mean nothing."""
    torch_python: str = ""
    """An interpreter that has PyTorch."""

    def record(self, what: str, **facts: Any) -> None:
        """Append a measurement."""
        append(self.file, {"kind": "result", "step": self.step, "what": what, "smoke": self.smoke, **facts})

    def left(self) -> float:
        """Seconds until this step is stopped."""
        return self.deadline - time.time()

    def dataset(self) -> str:
        """The images as a data set's name; they are unpacked once a run. Raises SkipStep without any."""
        from accelerator import images

        unpacked = self.work / ("digits8.npz" if self.smoke else "images.npz")
        if self.smoke or (self.images.endswith(".npz") and not self.images.startswith("npz:")):
            if not unpacked.exists():
                begin, partial = time.perf_counter(), self.work / f"{self.step}.npz"
                if self.smoke:
                    images.digits(partial)
                else:
                    images.unpack(Path(self.images), partial)
                partial.rename(unpacked)
                self.record("unpacking", seconds=time.perf_counter() - begin)
            return f"npz:{unpacked}"
        if not self.images:
            raise SkipStep("no images: run prepare.sh before, or give --images")
        return self.images
