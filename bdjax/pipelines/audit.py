"""Audit a model: run detectors and combine what they find into a verdict on a backdoor and its target class.

A detector with a null distribution reports a p-value, and Holm's correction combines those into the verdict. Detectors
without one (age, universal, baeraser) are evidence that does not convict alone. How often the verdict errs was measured
in experiments/audit/error_rates.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import metrics, registry
from bdjax.config import Experiment, stage_key, to_json
from bdjax.engine import parallel, predict
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import plausibility
from bdjax.pipelines.artifact import ModelArtifact
from bdjax.pipelines.context import Context
from bdjax.pipelines.environment import environment
from bdjax.pipelines.opening import EvaluationSource, open_recorded
from bdjax.pipelines.results import AuditResult
from bdjax.types import Data, DefenderView, Scores

NO_IMAGES = "none"
"""Data set that stands for no clean images: only detectors that need none run."""

LEVEL = 0.05
"""Level of the verdict with clean images."""
LEVEL_WITHOUT_IMAGES = 0.03
"""Level of the verdict without images, where clean models differ more from the null distribution. Both levels were
chosen on the development half of experiments/audit/error_rates.py."""


@dataclass(frozen=True)
class AuditSettings:
    """How detectors are run."""

    seed: int = 0
    """Draws the images and the detectors' random numbers."""
    configs: Mapping[str, Any] = field(default_factory=dict)
    """Configs by detector; default their defaults."""
    level: float | None = None
    """Level of the verdict, in (0, 0.3]: it is "backdoored" when a detector's p-value, corrected for the number of
    detectors, is at most this. None: LEVEL, or LEVEL_WITHOUT_IMAGES."""
    budget: float | None = None
    """Seconds, compilation included, after which no further detector is started; None: all run."""
    references: tuple[ModelArtifact, ...] = ()
    """Clean models of the same shape and classes, at least two: the same detectors run on them, and each class of the
    audited model is compared with itself there."""

    def __post_init__(self) -> None:
        if self.level is not None and not 0 < self.level <= 0.3:
            raise InputError(f"the level of an audit must be in (0, 0.3], got {self.level}.")
        if self.budget is not None and self.budget <= 0:
            raise InputError(f"the budget of an audit must be positive, in seconds; got {self.budget}.")
        if len(self.references) == 1:
            raise InputError(
                "an audit needs two clean reference models at the least, to see how much they differ; got one."
            )


def choose_detectors(names: Sequence[str] = (), images: bool = True) -> list[str]:
    """The detectors of these names, or the default ones.

    Detectors that need no images are the default only where there are none: they err more often.

    Args:
      names: of detectors, or paths of files.
      images: whether there are clean images.

    Returns:
      The names.

    Raises:
      InputError: for a name that is no detector, and for one that needs images where there are none.
    """
    known = registry.names("detectors")
    if unknown := [name for name in names if name not in known and not name.endswith(".py")]:
        raise InputError(f"{', '.join(unknown)} cannot audit. Choose from {', '.join(known)}.")
    specs = {name: registry.load("detectors", name) for name in names or known}
    if not images and (hungry := [name for name in names if specs[name].needs_images]):
        raise InputError(f"{', '.join(hungry)} need clean images. Give some by --clean-data DATA.")
    return list(names) or [
        name for name, spec in specs.items() if not spec.on_request and spec.needs_images == images
    ]  # fmt: skip


def audit(
    directory: Path,
    detectors: Sequence[str] = (),
    *,
    dataset: str | None = None,
    size: int | None = None,
    settings: AuditSettings | None = None,
    references: Sequence[Path] = (),
    context: Context | None = None,
    say: Callable[[str, Mapping[str, Any]], None] = lambda name, finding: None,
) -> tuple[AuditResult, dict[str, np.ndarray]]:
    """Ask detectors whether the model in a directory is backdoored, and towards which class.

    Args:
      directory: of a victim, an imported or purified model, or a run (then its purified model).
      detectors: names; none: all but those that run on request only.
      dataset: data set whose test images are used; None: the model's own, or no images for an imported model;
        "none": no images.
      size: number of images; None: 1,000, or all if there are fewer.
      settings: seed, level, budget and Configs of the detectors.
      references: directories of clean models of the same kind; added to those of the settings.
      context: devices, progress.
      say: called with (detector, its finding) as soon as it has finished.

    Returns:
      (result, arrays that the detectors reported, as "DETECTOR/NAME").

    Raises:
      InputError: for a name that is no detector, and for data or references that do not fit.
    """
    directory = checkpoint.model_directory(Path(directory))
    imported = checkpoint.read_record(directory)["kind"] == "imported"
    without = dataset == NO_IMAGES or (dataset is None and imported)
    names = choose_detectors(detectors, images=not without)
    artifact = _without_images(directory) if without else open_recorded(directory, EvaluationSource(dataset))
    settings = settings or AuditSettings()
    opened = tuple(_reference(Path(path), artifact) for path in references)
    settings = replace(settings, references=(*settings.references, *opened))
    images, labels = (artifact.data.x_test, artifact.data.y_test) if without else _draw_images(
        artifact, size, settings.seed
    )  # fmt: skip
    result, arrays = run_detectors(artifact, images, labels, names, settings, context, say)
    if without:
        return result, arrays
    predictions = predict(artifact.victim.model, artifact.victim.variables, images)
    remarks = plausibility.about(artifact.data, artifact.manifest, directory, predictions, labels)
    accuracy = float((predictions == labels).mean())
    return {**result, "accuracy": accuracy, **remarks}, arrays  # type: ignore[typeddict-item]


def run_detectors(
    artifact: ModelArtifact,
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    settings: AuditSettings | None = None,
    context: Context | None = None,
    say: Callable[[str, Mapping[str, Any]], None] = lambda name, finding: None,
) -> tuple[AuditResult, dict[str, np.ndarray]]:
    """Run detectors on an opened model with given clean images.

    Args:
      artifact: the model.
      images: stored [n, H, W, C]; a class without an image is judged by the detectors that need none of it.
      labels: int32 [n].
      names: of the detectors.
      settings: seed, level, budget and Configs.
      context: devices, progress.
      say: called with (detector, its finding) as soon as it has finished.

    Returns:
      (result, arrays that the detectors reported, as "DETECTOR/NAME").
    """
    settings, context = settings or AuditSettings(), context or Context()
    if settings.level is None:
        settings = replace(settings, level=LEVEL if len(labels) else LEVEL_WITHOUT_IMAGES)
    level = float(settings.level or LEVEL)
    findings: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    skipped: list[str] = []
    elapsed = 0.0
    with parallel.using(context.devices):
        for name in names:
            if settings.budget is not None and findings and elapsed >= settings.budget:
                skipped.append(name)
                continue
            findings[name], own_arrays = _finding(artifact, images, labels, name, settings, context)
            elapsed += findings[name]["seconds"] + findings[name]["compile"]
            arrays |= own_arrays
            say(name, findings[name])
    attack = artifact.experiment.attack if artifact.manifest["kind"] == "victim" else None
    result: Any = {
        "kind": "audit",
        "directory": str(artifact.directory),
        **{name: artifact.manifest[name] for name in ("model", "hash")},
        "dataset": artifact.data.name,
        "classes": list(plausibility.class_names(artifact.manifest, artifact.data)),
        "n": len(labels),
        "seed": settings.seed,
        "level": level,
        "references": [str(reference.directory) for reference in settings.references],
        "methods": findings,
        "skipped": skipped,
        **combine(findings, level),
        "truth": None if attack is None else {"poisoned": attack != "clean", "attack": attack},
        "env": environment(context.devices),
    }
    return result, {"clean": np.asarray(images[:8]), **arrays}


def combine(findings: Mapping[str, Mapping[str, Any]], level: float = LEVEL) -> dict[str, Any]:
    """The verdict of several detectors.

    Where detectors have p-values, these are corrected for their number (Holm), and the model is judged to be backdoored
    when one is at most the level; the classes that those detectors accuse are reported, the one with the smallest
    p-value first. Where none has one, two must accuse the same class, or the only one that ran.

    Args:
      findings: by detector, with "poisoned", "target" and, where it has them, "p_value" and "targets".
      level: of the verdict.

    Returns:
      {"poisoned", "target", "targets", "accused_by", "p_value"}; "accused_by" are all detectors that accuse the target,
      "p_value" is the smallest corrected one, or None.
    """
    p_values = {name: row["p_value"] for name, row in findings.items() if row.get("p_value") is not None}
    if not p_values:
        return {**_agreement(findings), "p_value": None}
    corrected = metrics.holm(p_values)
    targets: list[int] = []
    for name in sorted(corrected, key=lambda name: corrected[name]):
        if corrected[name] <= level:
            accused = findings[name].get("targets") or [findings[name]["target"]]
            targets += [label for label in accused if label not in targets]
    convinced = [
        name for name, row in findings.items() if corrected.get(name, 0.0 if row["poisoned"] else 1.0) <= level
    ]
    accusers = [name for name in convinced if targets and findings[name]["target"] == targets[0]]
    return {
        "poisoned": bool(targets), "target": targets[0] if targets else None, "targets": targets,
        "accused_by": accusers, "p_value": min(corrected.values()),
    }  # fmt: skip


def _agreement(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict of detectors without p-values: poisoned when two accuse the same class, or the only one that ran."""
    accused: dict[int, list[str]] = {}
    for name, finding in findings.items():
        if finding["poisoned"]:
            accused.setdefault(finding["target"], []).append(name)
    target = max(accused, key=lambda label: len(accused[label]), default=None)
    if target is None or len(accused[target]) < min(2, len(findings)):
        return {"poisoned": False, "target": None, "targets": [], "accused_by": []}
    return {"poisoned": True, "target": target, "targets": [target], "accused_by": accused[target]}


def _finding(
    artifact: ModelArtifact,
    images: np.ndarray,
    labels: np.ndarray,
    name: str,
    settings: AuditSettings,
    context: Context,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run one detector on the model and on the references: its finding as JSON values, and its arrays."""
    spec, clock, recorder = registry.load("detectors", name), Clock(), Recorder(context.tick)
    config = settings.configs.get(name) or spec.Config()
    key = stage_key(settings.seed, "defense")
    scores = spec.detect(config, artifact.victim, DefenderView(images, labels, recorder), key)
    if settings.references and scores.p_value is not None:
        silent = DefenderView(images, labels, Recorder(context.tick))
        rows = [spec.detect(config, reference.victim, silent, key).classes for reference in settings.references]
        scores = _by_reference(scores, np.stack(rows), float(settings.level or LEVEL))
    seconds, compiling = clock.read()
    scalars = {k: v for row in recorder.rows for k, v in row.items() if isinstance(v, float)}
    finding = {
        **scores.plain(),
        **{k: value if np.isfinite(value) else None for k, value in scalars.items()},
        "seconds": seconds,
        "compile": compiling,
        "config": to_json(config),
    }
    arrays = {f"{name}/{k}": v for k, v in recorder.arrays.items() if not k.endswith("_first")}
    return finding, arrays


def _by_reference(scores: Scores, references: np.ndarray, level: float) -> Scores:
    """The scores with p-values by comparison with clean models in place of those by comparison of the classes."""
    p_values = metrics.reference_p_values(scores.classes, references)
    order = np.argsort(p_values, kind="stable")
    targets = tuple(int(label) for label in order if len(p_values) * p_values[label] <= level)
    target = int(order[0])
    return replace(
        scores, target=target, score=float(scores.classes[target]), poisoned=bool(targets),
        p_value=metrics.model_p_value(p_values), targets=targets,
    )  # fmt: skip


def _reference(path: Path, artifact: ModelArtifact) -> ModelArtifact:
    """Open a clean reference model. Raises InputError when it is of another shape or number of classes."""
    reference = open_recorded(checkpoint.model_directory(path), EvaluationSource(data=artifact.data))
    if reference.directory.resolve() == artifact.directory.resolve():
        raise InputError(f"{path} is the audited model itself. A reference is another model that is known to be clean.")
    return reference


def _without_images(directory: Path) -> ModelArtifact:
    """Open a model without a data set."""
    manifest = checkpoint.read_record(directory)
    shape, classes = tuple(manifest["shape"]), tuple(map(str, manifest["classes"]))
    images, labels = np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32)
    data = Data("no images", images, labels, images, labels, classes)
    attack = (manifest.get("attack") or {}).get("name", "clean")
    experiment = Experiment(attack, None, NO_IMAGES, manifest["model"])
    return ModelArtifact(directory, manifest, experiment, data, held_out=False)


def _draw_images(artifact: ModelArtifact, size: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw test images without repetition. Raises InputError when there are fewer than `size`."""
    images, labels = artifact.data.x_test, artifact.data.y_test
    if size is not None and not 1 <= size <= len(labels):
        raise InputError(
            f"--size must be from 1 to {len(labels)}, the test images of {artifact.data.name}; got {size}."
        )
    order = np.asarray(jax.random.permutation(stage_key(seed, "split"), len(labels)))[: size or 1000]
    return images[order], labels[order]
