"""The objects that the public API returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import interop
from bdjax.config import FitConfig
from bdjax.engine import predict
from bdjax.io import checkpoint
from bdjax.pipelines.results import AuditResult, PurifyResult, Rates, RunResult
from bdjax.reports import audit as audit_report
from bdjax.reports import figure as run_figure
from bdjax.reports import purification as purification_report
from bdjax.reports import table
from bdjax.types import Variables, to_float


@dataclass(frozen=True)
class Model:
    """A model in a directory. Calling it on images gives logits."""

    directory: Path

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What the directory records: model, classes, training, attack, data set, environment."""
        return checkpoint.read_record(self.directory)

    @cached_property
    def _loaded(self) -> tuple[Any, Variables]:
        model = interop.model_of(dict(self.manifest), FitConfig().dtype)
        like = jax.eval_shape(model.init, jax.random.key(0))
        return model, checkpoint.read_variables(self.directory, like)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs."""
        return tuple(self.manifest["classes"])

    @property
    def variables(self) -> Variables:
        """The Flax variables, {"params", "batch_stats"}."""
        return self._loaded[1]

    def __call__(self, images: Any) -> Any:
        """Logits, float32 [N, classes], of images [N, H, W, C]: float32 in [0, 1] or uint8."""
        model, variables = self._loaded
        return model.logits(variables, to_float(images))

    def predict(self, images: Any) -> np.ndarray:
        """Predicted classes, int32 [N], of any number of images [N, H, W, C], in batches."""
        model, variables = self._loaded
        return np.asarray(predict(model, variables, np.asarray(images)))


@dataclass(frozen=True)
class Run:
    """A finished defense: `print(run)` shows its table, and a notebook its figure."""

    directory: Path
    result: RunResult
    """The content of result.json."""

    @property
    def before(self) -> Rates:
        """Rates of the victim, fractions in [0, 1]."""
        return self.result["before"]

    @property
    def after(self) -> Rates:
        """Rates of the cleaned model, fractions in [0, 1]."""
        return self.result["after"]

    @property
    def model(self) -> Model:
        """The cleaned model."""
        return Model(self.directory / "purified")

    @property
    def figure(self) -> Path:
        """Path of a PNG: triggered images, what the defense found, and the curve; drawn when first asked for."""
        path = self.directory / "figure.png"
        if not path.exists():
            run_figure.draw(dict(self.result), checkpoint.read_arrays(self.directory, "arrays"), path)
        return path

    def __str__(self) -> str:
        return table.one(dict(self.result))

    def _repr_png_(self) -> bytes:
        return self.figure.read_bytes()


@dataclass(frozen=True)
class Audit:
    """A finished audit: `print(audit)` shows its table."""

    result: AuditResult
    arrays: Mapping[str, np.ndarray]
    """What the detectors reported, as "DETECTOR/NAME"; "clean": some of the images."""

    @property
    def poisoned(self) -> bool:
        """The verdict."""
        return self.result["poisoned"]

    @property
    def target(self) -> int | None:
        """The class that the detectors accuse, or None."""
        return self.result["target"]

    def draw(self, path: Path) -> Path:
        """Write a PNG of the recovered triggers."""
        return audit_report.draw(dict(self.result), dict(self.arrays), Path(path))

    def __str__(self) -> str:
        return audit_report.table(dict(self.result))


@dataclass(frozen=True)
class Purification:
    """A finished purification: `print(purification)` shows its summary."""

    directory: Path
    result: PurifyResult
    """The content of result.json."""

    @property
    def model(self) -> Model:
        """The cleaned model."""
        return Model(self.directory / "purified" / "purified")

    @property
    def weights(self) -> Path:
        """The cleaned weights, a file of the input's format."""
        return self.directory / str(self.result["weights"]["file"])

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.directory / "report.html"

    def __str__(self) -> str:
        return purification_report.summary(dict(self.result), self.directory)
