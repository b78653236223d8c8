"""Audit a model: run detectors and combine what they find into a verdict on a backdoor and its target class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import registry
from bdjax.config import stage_key, to_json
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
from bdjax.types import DefenderView


@dataclass(frozen=True)
class AuditSettings:
    """How detectors are run."""

    seed: int = 0
    """Draws the images and the detectors' random numbers."""
    configs: Mapping[str, Any] = field(default_factory=dict)
    """Configs by detector; default their defaults."""


def choose_detectors(names: Sequence[str] = ()) -> list[str]:
    """The detectors of these names; without names all that do not run on request only.

    Raises InputError for a name that is no detector.
    """
    known = registry.names("detectors")
    if unknown := [name for name in names if name not in known and not name.endswith(".py")]:
        raise InputError(f"{', '.join(unknown)} cannot audit. Choose from {', '.join(known)}.")
    return list(names) or [name for name in known if not registry.load("detectors", name).on_request]


def audit(
    directory: Path,
    detectors: Sequence[str] = (),
    *,
    dataset: str | None = None,
    size: int | None = None,
    settings: AuditSettings | None = None,
    context: Context | None = None,
) -> tuple[AuditResult, dict[str, np.ndarray]]:
    """Ask detectors whether the model in a directory is backdoored, and towards which class.

    Args:
      directory: of a victim, an imported or purified model, or a run (then its purified model).
      detectors: names; none: all but those that run on request only, which take many times as long.
      dataset: data set whose test images are used; None: the model's own.
      size: number of images; None: 1,000, or all if there are fewer.
      settings: seed and Configs of the detectors.
      context: devices, progress.

    Returns:
      (result, arrays that the detectors reported, as "DETECTOR/NAME").

    Raises:
      InputError: for a name that is no detector, and for classes without a clean image.
    """
    names, settings = choose_detectors(detectors), settings or AuditSettings()
    directory = checkpoint.model_directory(Path(directory))
    artifact = open_recorded(directory, EvaluationSource(dataset))
    images, labels = _draw_images(artifact, size, settings.seed)
    predictions = predict(artifact.victim.model, artifact.victim.variables, images)
    remarks = plausibility.about(artifact.data, artifact.manifest, directory, predictions, labels)
    result, arrays = run_detectors(artifact, images, labels, names, settings, context)
    accuracy = float((predictions == labels).mean())
    return {**result, "accuracy": accuracy, **remarks}, arrays  # type: ignore[typeddict-item]


def run_detectors(
    artifact: ModelArtifact,
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    settings: AuditSettings | None = None,
    context: Context | None = None,
) -> tuple[AuditResult, dict[str, np.ndarray]]:
    """Run detectors on an opened model with given clean images.

    Args:
      artifact: the model.
      images: stored [n, H, W, C]; a class without an image is judged by the detectors that need none of it.
      labels: int32 [n].
      names: of the detectors.
      settings: seed and Configs.
      context: devices, progress.

    Returns:
      (result, arrays that the detectors reported, as "DETECTOR/NAME").
    """
    settings, context = settings or AuditSettings(), context or Context()
    findings: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    with parallel.using(context.devices):
        for name in names:
            spec, clock, recorder = registry.load("detectors", name), Clock(), Recorder(context.tick)
            config = settings.configs.get(name) or spec.Config()
            view = DefenderView(images, labels, recorder)
            scores = spec.detect(config, artifact.victim, view, stage_key(settings.seed, "defense"))
            seconds, compiling = clock.read()
            scalars = {k: v for row in recorder.rows for k, v in row.items() if isinstance(v, float)}
            findings[name] = {
                **scores.plain(),
                **{k: value if np.isfinite(value) else None for k, value in scalars.items()},
                "seconds": seconds,
                "compile": compiling,
                "config": to_json(config),
            }
            arrays |= {f"{name}/{k}": v for k, v in recorder.arrays.items() if not k.endswith("_first")}
    attack = artifact.experiment.attack if artifact.manifest["kind"] == "victim" else None
    result: Any = {
        "kind": "audit",
        "directory": str(artifact.directory),
        **{name: artifact.manifest[name] for name in ("model", "hash")},
        "dataset": artifact.data.name,
        "classes": list(plausibility.class_names(artifact.manifest, artifact.data)),
        "n": len(labels),
        "seed": settings.seed,
        "methods": findings,
        **combine(findings),
        "truth": None if attack is None else {"poisoned": attack != "clean", "attack": attack},
        "env": environment(context.devices),
    }
    return result, {"clean": np.asarray(images[:8]), **arrays}


def combine(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict of several detectors: poisoned when two accuse the same class, or the only one that ran does.

    Some detectors accuse clean models, too, mostly of different classes (experiments/results/audit_errors). Between two
    classes with as many accusers the one with the earlier first accuser counts.

    Returns:
      {"poisoned", "target", "accused_by"}.
    """
    accused: dict[int, list[str]] = {}
    for name, finding in findings.items():
        if finding["poisoned"]:
            accused.setdefault(finding["target"], []).append(name)
    target = max(accused, key=lambda label: len(accused[label]), default=None)
    if target is None or len(accused[target]) < min(2, len(findings)):
        return {"poisoned": False, "target": None, "accused_by": []}
    return {"poisoned": True, "target": target, "accused_by": accused[target]}


def _draw_images(artifact: ModelArtifact, size: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = artifact.data.x_test, artifact.data.y_test
    if size is not None and not 1 <= size <= len(labels):
        raise InputError(
            f"--size must be from 1 to {len(labels)}, the test images of {artifact.data.name}; got {size}."
        )
    order = np.asarray(jax.random.permutation(stage_key(seed, "split"), len(labels)))[: size or 1000]
    missing = sorted(set(range(len(artifact.data.classes))) - set(labels[order].tolist()))
    if missing:
        raise InputError(
            f"no clean image of class {', '.join(map(str, missing))} among the {len(order)} of the audit: it cannot be "
            "judged. Use a larger --size or a data set with images of every class."
        )
    return images[order], labels[order]
