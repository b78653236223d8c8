"""Purify a model with one call: import it, audit it, clean it, audit and measure the result, and export it.

    OUT/model            the imported model (a model directory is used where it is)
    OUT/purified         the run of the defense, a directory like any other run's
    OUT/purified.pt      the cleaned weights, or .pth or .safetensors, as the input
    OUT/audit.json       what the audit found, with audit.png; audit-after.json and .png: the same afterwards
    OUT/pictures         pictures of the report
    OUT/report.html      one file with everything in it, for people
    OUT/result.json      the same for programs; written last

All rates are measured on clean images that neither the defense nor any choice made here has seen.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bdjax import interop, metrics
from bdjax.config import to_json
from bdjax.engine import predict
from bdjax.errors import InputError
from bdjax.interop import assumptions
from bdjax.io import checkpoint
from bdjax.pipelines import plausibility
from bdjax.pipelines.artifact import ModelArtifact, check_fits
from bdjax.pipelines.audit import AuditSettings, run_detectors
from bdjax.pipelines.context import Context
from bdjax.pipelines.defend import DefenseRequest, defend, finished_result
from bdjax.pipelines.environment import environment
from bdjax.pipelines.opening import EvaluationSource, open_artifact, open_recorded
from bdjax.pipelines.purify_request import PurifyRequest, ResolvedPurification, resolve_purification
from bdjax.pipelines.results import AuditResult, PurifyResult, RunResult, write_json

_AUDITED = 1000  # held-out images that an audit is given, at most
_PICTURES = 8  # pictures of changed predictions, of each kind


class Reporter(Protocol):
    """Sentences, pictures and the page of a purification (:mod:`bdjax.reports.purification`)."""

    def import_notes(self, manifest: Mapping[str, Any]) -> list[str]:
        """Sentences on how a weight file was read."""

    def verdict(self, result: AuditResult) -> str:
        """The verdict of an audit as a sentence."""

    def audit_pictures(
        self, result: AuditResult, arrays: Mapping[str, np.ndarray], folder: Path, name: str
    ) -> list[dict[str, str]]:
        """Write the figure of an audit and a picture of each recovered trigger.

        Args:
          result: of the audit.
          arrays: that the detectors reported, as "DETECTOR/NAME".
          folder: of the purification.
          name: of the figure.

        Returns:
          File, detector ("method") and title of each picture.
        """

    def picture(self, folder: Path, name: str, image: np.ndarray) -> str:
        """Write an image.

        Args:
          folder: of the purification.
          name: of the picture.
          image: stored [H, W, C].

        Returns:
          The file's name within the folder.
        """

    def notes(self, result: PurifyResult) -> list[str]:
        """Sentences that a reader must know before believing the result."""

    def page(self, result: PurifyResult, folder: Path) -> None:
        """Write report.html."""


@dataclass(frozen=True)
class _Work:
    """The steps of one purification share these."""

    artifact: ModelArtifact
    resolved: ResolvedPurification
    out: Path
    context: Context
    reporter: Reporter
    say: Callable[[str], None]


def purify(
    request: PurifyRequest,
    out: Path,
    reporter: Reporter,
    *,
    page: bool = True,
    context: Context | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PurifyResult:
    """Clean a model and write everything to a directory; a finished directory of the same request is only read.

    Args:
      request: model, clean images, defense, detectors.
      out: directory of everything.
      reporter: makes sentences, pictures and the page.
      page: write report.html.
      context: devices, progress.
      say: called with a line for each step.

    Returns:
      The content of result.json.

    Raises:
      InputError: for what cannot work; a new `out` is then not left behind.
    """
    context, out = context or Context(), Path(out)
    resolved = resolve_purification(request, out)
    with checkpoint.locked(out, context.waiting):
        finished: Any = finished_result(out, resolved.hash)
        if finished is not None:
            say(f"finished before: {out}")
            if page and not (out / "report.html").exists():
                reporter.page(finished, out)
            recorded: PurifyResult = finished
            return recorded
        new = not out.exists() or not any(out.iterdir())
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "config.json", resolved.record)
            model = _import(resolved, out, reporter, say)
            artifact = open_artifact(
                model, request.defense, resolved.config, split=resolved.split, seed=request.seed,
                source=EvaluationSource(resolved.dataset, resolved.data),
            )  # fmt: skip
            result = _clean(_Work(artifact, resolved, out, context, reporter, say))
        except InputError:
            if new:  # nobody else's files were there
                shutil.rmtree(out, ignore_errors=True)
            raise
        result |= {"input": dict(resolved.input), "command": request.command, "config_hash": resolved.hash}
        result["notes"] = reporter.notes(result)
        if page:
            reporter.page(result, out)
        write_json(out / "result.json", result)
    return result


def _import(resolved: ResolvedPurification, out: Path, reporter: Reporter, say: Callable[[str], None]) -> Path:
    """The model directory; a file is imported into OUT/model."""
    source = Path(resolved.request.source)
    if resolved.input["kind"] != "file":
        return Path(resolved.input["path"])
    if not (out / "model").exists():
        say(f"importing {source}")
        options = dict(resolved.request.import_options)
        manifest = interop.import_model(source, out / "model", **options, env=environment())
        for line in assumptions.describe(manifest["assumed"], manifest["tried"], manifest["note"]):
            say(f"network: {line}")
        for line in reporter.import_notes(manifest):
            say(line)
    check_fits(checkpoint.read_record(out / "model"), source, resolved.data)
    return out / "model"


def _clean(work: _Work) -> PurifyResult:
    """Audit, defend, audit again, compare, export."""
    artifact, resolved, out, say = work.artifact, work.resolved, work.out, work.say
    evaluation, experiment = artifact.evaluation, artifact.experiment
    shutil.rmtree(out / "pictures", ignore_errors=True)  # of a call that was killed
    (out / "pictures").mkdir()
    say(f"{len(evaluation.clean_labels)} clean images to clean with, {len(evaluation.labels)} held out to measure on")
    model = artifact.victim.model
    before = predict(model, artifact.victim.variables, evaluation.images)
    remarks = plausibility.about(
        artifact.data, artifact.manifest, artifact.directory, before, evaluation.labels, evaluation.targets
    )
    for line in [*remarks["data"], *(f"warning: {warning}" for warning in remarks["warnings"])]:
        say(line)
    audits = {"before": _audit(work, artifact, "audit")}
    say(f"cleaning with {resolved.request.defense}")
    run = defend(
        DefenseRequest(
            artifact.directory, resolved.request.defense, resolved.config, experiment.split, experiment.seed,
            EvaluationSource(experiment.dataset, artifact.data),
        ),
        out / "purified",
        replace(work.context, estimate=True),
    )  # fmt: skip
    purified = open_recorded(out / "purified" / "purified", EvaluationSource(data=artifact.data))
    audits["after"] = _audit(work, purified, "audit-after")
    weights = _export(artifact, out)
    predictions = {"before": before, "after": predict(model, purified.victim.variables, evaluation.images)}
    return _result(work, run, remarks, predictions, audits, weights)


def _result(
    work: _Work,
    run: RunResult,
    remarks: Mapping[str, list[str]],
    predictions: Mapping[str, np.ndarray],
    audits: dict[str, dict[str, Any]],
    weights: dict[str, Any],
) -> PurifyResult:
    artifact, evaluation, data = work.artifact, work.artifact.evaluation, work.artifact.data
    classes = artifact.victim.model.classes
    counts = [np.bincount(labels, minlength=classes) for labels in (evaluation.clean_labels, evaluation.labels)]
    asr = None
    if run["attack"] != "clean":
        rates = {"before": run["before"]["asr"], "after": run["after"]["asr"]}
        asr = {"attack": run["attack"], "n": run["n_asr"], **rates}
    correct = {phase: int((predicted == evaluation.labels).sum()) for phase, predicted in predictions.items()}
    config = work.resolved.config
    return {
        "kind": "purification",
        "model": {
            **{name: artifact.manifest.get(name) for name in ("model", "shape", "input")},
            "directory": str(artifact.directory.absolute()),
            "source": artifact.manifest.get("source"),
        },
        "classes": list(plausibility.class_names(artifact.manifest, data)),
        "data_notes": remarks["data"],
        "warnings": remarks["warnings"],
        "data": {"spec": artifact.experiment.dataset, "name": data.name, "fingerprint": data.fingerprint},
        "split": to_json(artifact.experiment.split),
        "n_defender": len(evaluation.clean_labels),
        "n_held_out": len(evaluation.labels),
        "by_class": [list(map(int, pair)) for pair in zip(*counts, strict=True)],
        "accuracy": {phase: _interval(count, len(evaluation.labels)) for phase, count in correct.items()},
        "asr": asr,
        "changed": _changed(work, predictions["before"], predictions["after"]),
        "audit": audits,
        "estimate": run["estimate"],
        "rolled_back_to": next((row["rolled_back_to"] for row in run["rounds"] if "rolled_back_to" in row), None),
        "defense": work.resolved.request.defense,
        "defense_config": to_json(config),
        "defaults": to_json(type(config)()),
        "seed": artifact.experiment.seed,
        "seconds": {"defense": run["seconds"]["defense"], "compile": run["seconds"]["compile"]},
        "weights": weights,
        "env": environment(work.context.devices),
    }


def _audit(work: _Work, audited: ModelArtifact, name: str) -> dict[str, Any]:
    """Audit a model with held-out images; write NAME.json, NAME.png and the pictures of the report."""
    resolved, evaluation = work.resolved, work.artifact.evaluation
    request = resolved.request
    work.say(f"auditing {audited.directory} by {', '.join(resolved.detectors)}")
    drawn = np.random.default_rng(request.seed).permutation(len(evaluation.labels))[:_AUDITED]
    settings = AuditSettings(request.seed, request.detector_configs)
    images, labels = evaluation.images[drawn], evaluation.labels[drawn]
    result, arrays = run_detectors(audited, images, labels, resolved.detectors, settings, work.context)
    write_json(work.out / f"{name}.json", result)
    pictures = work.reporter.audit_pictures(result, arrays, work.out, name)
    verdict = work.reporter.verdict(result)
    work.say(f"{name}: {verdict}")
    fields = ("poisoned", "target", "targets", "accused_by", "p_value", "level", "methods", "n", "truth")
    return {**{field: result[field] for field in fields}, "verdict": verdict, "pictures": pictures}  # type: ignore[literal-required]


def _export(artifact: ModelArtifact, out: Path) -> dict[str, Any]:
    """Export the cleaned weights in the format of the input; a model that was trained here in PyTorch's."""
    source = artifact.manifest.get("source") or {"format": "torch", "file": ""}
    form = "safetensors" if source["format"] == "safetensors" else "torch"
    ending = ".safetensors" if form == "safetensors" else ".pth" if source["file"].lower().endswith(".pth") else ".pt"
    file = out / f"purified{ending}"
    exported = interop.export_model(out / "purified" / "purified", form, file)
    return {"file": file.name, "format": form, "sha256": checkpoint.sha256(file), **exported}


def _interval(correct: int, n: int) -> dict[str, float]:
    """An accuracy with Wilson's 95 % interval."""
    low, high = metrics.wilson(correct, n)
    return {"right": correct, "n": n, "rate": correct / n, "low": low, "high": high}


def _changed(work: _Work, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Count the predictions that differ, and write pictures of the first of each kind."""
    evaluation = work.artifact.evaluation
    images, labels = evaluation.images, evaluation.labels
    kinds = {
        "broken": (before == labels) & (after != labels),
        "mended": (before != labels) & (after == labels),
        "other": (before != labels) & (after != labels) & (before != after),
    }
    pictures = [
        {"file": work.reporter.picture(work.out, f"changed-{kind}-{number}", images[at]), "sort": kind,
         "label": int(labels[at]), "before": int(before[at]), "after": int(after[at])}
        for kind, differs in kinds.items()
        for number, at in enumerate(np.flatnonzero(differs)[:_PICTURES])
    ]  # fmt: skip
    counts = {kind: int(differs.sum()) for kind, differs in kinds.items()}
    return {**counts, "all": int((before != after).sum()), "shown": pictures}
