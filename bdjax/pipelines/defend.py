"""Defend the model in a directory: resolve the request, purify, measure and record."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from bdjax import registry
from bdjax.config import SplitConfig, digest, run_record, stage_key, to_json
from bdjax.defenses._guard import guarded, split_off
from bdjax.engine import parallel
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock, peak_memory
from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.io.files import read_record
from bdjax.pipelines import plausibility, verdicts
from bdjax.pipelines.artifact import ModelArtifact, experiment_of
from bdjax.pipelines.context import Context
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.opening import EvaluationSource, open_artifact, open_clean
from bdjax.pipelines.poisoned_set import poisoned_task
from bdjax.pipelines.results import SCHEMA, Rates, RunResult, read_result, write_json
from bdjax.pipelines.training import check_same_run, clean_experiment, victim_directory
from bdjax.protocols import DefenseSpec
from bdjax.types import DefenderView, Variables

_CURVE = 1000
"""Held-out images, at most, that a model is measured on after each round of a defense, clean and triggered."""


@dataclass(frozen=True)
class DefenseRequest:
    """A defense of the model in a directory."""

    victim: Path
    """Directory of a victim, an imported or a purified model; its data set is looked up again and must be the same."""
    defense: str
    """Name in bdjax.defenses, or the path of a .py file."""
    config: Any = None
    """The defense's Config; None: the defaults."""
    split: SplitConfig | None = None
    """The defender's images; None: the defaults."""
    seed: int | None = None
    """Of the defense; None: the victim's."""
    source: EvaluationSource = field(default_factory=EvaluationSource)
    """The data set where it has moved, and what an imported model is measured with."""
    clean_model: Path | None = None
    """Directory of a model trained alike without poison, for the score; None: the one beside the victim, if any."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Goes into the result as it is (which cell of a grid this is)."""


@dataclass(frozen=True)
class ResolvedDefense:
    """A defense whose method, model, data, directories and hash are known and checked."""

    artifact: ModelArtifact
    spec: DefenseSpec
    record: Mapping[str, Any]
    """What decides the numbers, as JSON values."""
    hash: str
    clean_model: Path | None
    extra: Mapping[str, Any]

    def directory_in(self, root: Path) -> Path:
        """Where a result that is kept by its hash stands: root/HASH."""
        return Path(root) / self.hash[:16]


@dataclass(frozen=True)
class _Cleaned:
    """What a defense gave back, and what it cost."""

    variables: Variables
    view: DefenderView
    recorder: Recorder
    key: jax.Array
    seconds: float
    compile_seconds: float
    peak_memory: tuple[int | None, str]


def resolve_defense(request: DefenseRequest) -> ResolvedDefense:
    """Look everything up that a defense needs, and refuse what cannot work.

    Raises InputError for an unknown method, a damaged directory, another data set, and an unfit attack.
    """
    spec = registry.load("defenses", request.defense)
    victim = Path(request.victim)
    config = request.config if request.config is not None else spec.Config()
    artifact = open_artifact(
        victim, request.defense, config, split=request.split, seed=request.seed, source=request.source
    )
    record = run_record(artifact.experiment, artifact.manifest["hash"])
    clean_model = request.clean_model or _clean_neighbour(victim, artifact.manifest)
    return ResolvedDefense(artifact, spec, record, digest(record), clean_model, request.extra)


def defend(request: DefenseRequest, directory: Path, context: Context | None = None) -> RunResult:
    """Defend the model in a directory and write the cleaned model and the numbers, unless that is done already.

    Args:
      request: model, defense, split and seed.
      directory: gets config.json, env.json, metrics.jsonl, arrays.npz, purified/ and, last, result.json.
      context: devices, progress, what is measured.

    Returns:
      The result. A finished result without a score gets it, when a clean model is at hand now.

    Raises:
      InputError: for what cannot work, and when `directory` holds another run.
    """
    return defend_resolved(resolve_defense(request), Path(directory), context or Context())


def defend_resolved(defense: ResolvedDefense, directory: Path, context: Context) -> RunResult:
    """Carry out a resolved defense in a directory, or return its finished result.

    Args:
      defense: what is to be done.
      directory: of the run.
      context: devices, progress, what is measured.

    Returns:
      The result.

    Raises:
      InputError: `directory` holds another run.
    """
    finished = finished_result(directory, defense.hash)
    if finished is not None and (defense.clean_model is None or finished["clean"] is not None):
        return finished
    with checkpoint.locked(directory, context.waiting):
        if (finished := finished_result(directory, defense.hash)) is None:
            return _carry_out(defense, directory, context)
        if defense.clean_model is not None and finished["clean"] is None:
            clean = open_clean(defense.clean_model, defense.artifact)
            rates = defense.artifact.evaluation.measure(clean.victim.variables)
            with records.reading_record(directory / "result.json"):
                finished |= verdicts.beside(rates, finished["before"], finished["after"])  # type: ignore[typeddict-item]
            write_json(directory / "result.json", finished)
        return finished


def _carry_out(defense: ResolvedDefense, directory: Path, context: Context) -> RunResult:
    """Measure the victim, purify it, measure what came out, and record everything; result.json is written last."""
    artifact = defense.artifact
    evaluation = artifact.evaluation
    if context.measured:
        evaluation = evaluation.sample(context.measured)
    predictions = evaluation.predictions(artifact.victim.variables)
    before = evaluation.rates(*predictions)
    remarks = plausibility.about(
        artifact.data, artifact.manifest, artifact.directory, predictions[0], evaluation.labels, evaluation.targets
    )
    clean: Rates | None = None
    if defense.clean_model is not None:
        clean = evaluation.measure(open_clean(defense.clean_model, artifact).victim.variables)
    directory.mkdir(parents=True, exist_ok=True)
    env = environment(context.devices)
    write_json(directory / "config.json", defense.record)
    write_json(directory / "env.json", env)
    curve = evaluation.sample(_CURVE)
    cleaned = _purify(defense, curve, directory / "metrics.jsonl", context)
    after = evaluation.measure(cleaned.variables)
    detection = _detect(defense, evaluation, cleaned, context)
    clock = Clock()
    estimate = None
    if context.estimate:
        estimate = verdicts.estimate(artifact, cleaned.variables, cleaned.view, cleaned.recorder, context)
    measured: dict[str, Any] = {
        "before": before,
        "after": after,
        **verdicts.beside(clean, before, after),
        "estimate": estimate,
        "detection": detection,
        "seconds": _seconds(artifact, cleaned, clock.read()[0]),
        **remarks,
        "n_rounds": len(curve.images),
        "env": env,
    }
    result = _result(defense, evaluation, cleaned, measured)
    checkpoint.write_arrays(
        directory / "arrays.npz",
        {**evaluation.pictures(), **cleaned.recorder.arrays, "clean_indices": evaluation.clean_indices},
    )
    _write_purified(defense, directory / "purified", cleaned, env)
    write_json(directory / "result.json", result)
    return result


def _purify(defense: ResolvedDefense, curve: Evaluation, lines: Path, context: Context) -> _Cleaned:
    """Run the defense; its rounds are measured on `curve` and written to `lines`, outside its time."""
    artifact, experiment = defense.artifact, defense.artifact.experiment
    checkpoint.write_text(lines, "")
    clock = Clock()
    recorder = Recorder(context.tick, clock, curve.measure, lines if checkpoint.is_main_process() else None)
    with parallel.using(context.devices):
        key = stage_key(experiment.seed, "defense")
        view = artifact.view(recorder, defense.spec.needs_trigger(experiment.defense_config))
        split = experiment.split
        view = split_off(view, split.validation, jax.random.fold_in(stage_key(experiment.seed, "split"), 1))
        if defense.spec.train is not None:
            variables = defense.spec.train(experiment.defense_config, poisoned_task(artifact, recorder), key)
        else:
            variables = guarded(defense.spec, experiment.defense_config, artifact.victim, view, key, split.largest_drop)
        jax.block_until_ready(variables)
    return _Cleaned(variables, view, recorder, key, *clock.read(), peak_memory())


def _detect(
    defense: ResolvedDefense, evaluation: Evaluation, cleaned: _Cleaned, context: Context
) -> dict[str, Any] | None:
    """The detection that the defense reported, or made now if it can detect; None where it cannot."""
    artifact, clock, scores = defense.artifact, Clock(), cleaned.recorder.scores
    if scores is None and defense.spec.detect is not None:
        with parallel.using(context.devices):
            config = artifact.experiment.defense_config
            scores = defense.spec.detect(config, artifact.victim, artifact.view(), cleaned.key)
    if scores is None:
        return None
    attack = None if artifact.imported else artifact.experiment.attack
    return {**verdicts.verdict(scores, attack, evaluation), "seconds": clock.read()[0]}


def _seconds(artifact: ModelArtifact, cleaned: _Cleaned, estimating: float) -> dict[str, float]:
    training = artifact.manifest["seconds"]
    return {
        "attack": training["attack"],
        "defense": cleaned.seconds,
        "compile": training["compile"] + cleaned.compile_seconds,
        "estimate": estimating,
    }


def _result(
    defense: ResolvedDefense, evaluation: Evaluation, cleaned: _Cleaned, measured: Mapping[str, Any]
) -> RunResult:
    """The record of the run, from what was measured."""
    artifact, experiment = defense.artifact, defense.artifact.experiment
    validation = cleaned.view.validation
    memory, memory_of = cleaned.peak_memory
    result: Any = {
        "schema": SCHEMA,
        "attack": experiment.attack,
        "defense": experiment.defense,
        "dataset": artifact.data.name,
        "model": artifact.victim.model.name,
        "seed": experiment.seed,
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        "n_defender": len(evaluation.clean_labels),
        "n_validation": 0 if validation is None else len(validation.labels),
        **measured,
        "peak_memory_bytes": memory,
        "peak_memory_of": memory_of,
        "rounds": cleaned.recorder.rows,
        "attack_config": to_json(experiment.attack_config),
        "defense_config": to_json(experiment.defense_config),
        "fit": to_json(experiment.fit),
        "split": to_json(experiment.split),
        "victim_hash": artifact.manifest["hash"],
        "config_hash": defense.hash,
        **defense.extra,
    }
    record: RunResult = result
    return record


def _write_purified(defense: ResolvedDefense, directory: Path, cleaned: _Cleaned, env: Mapping[str, Any]) -> None:
    """Write the cleaned model as a model directory, with the trigger and the defender's images of the run."""
    artifact, experiment = defense.artifact, defense.artifact.experiment
    manifest = {
        **artifact.manifest,
        "kind": "purified",
        "hash": defense.hash,
        "victim_hash": artifact.manifest["hash"],
        "defense": {"name": experiment.defense, "config": to_json(experiment.defense_config), "seed": experiment.seed},
        "split": to_json(experiment.split),
        "env": env,
    }
    arrays = {"trigger": artifact.trigger_arrays, "split": {"indices": artifact.evaluation.clean_indices}}
    if (artifact.directory / "original.npz").exists():
        arrays["original"] = checkpoint.read_arrays(artifact.directory, "original")
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed before its result was written
    checkpoint.write_model(directory, manifest, cleaned.variables, arrays)


def _clean_neighbour(victim: Path, manifest: Mapping[str, Any]) -> Path | None:
    """The clean model that `run` keeps beside a victim, or None."""
    if manifest["kind"] == "imported":
        return None
    experiment, fingerprint = clean_experiment(experiment_of(manifest)), manifest["dataset"]["fingerprint"]
    directory = victim_directory(experiment, fingerprint, victim.parent)
    return directory if (directory / "manifest.json").is_file() else None


def finished_result(directory: Path, expected: str) -> RunResult | None:
    """The result of this very configuration, or None when the directory is free for it.

    A directory without a result may be an interrupted run of the same configuration, or new, or empty.

    Args:
      directory: of the run.
      expected: hash of the configuration.

    Returns:
      The finished result, or None.

    Raises:
      InputError: the directory holds something else.
    """
    if (finished := read_result(directory)) is not None:
        check_same_run(directory, finished.get("config_hash"), expected)
        return finished
    config = Path(directory) / "config.json"
    if config.is_file():
        try:
            recorded = digest(read_record(config))
        except (ValueError, RecursionError):
            recorded = None
        check_same_run(directory, recorded, expected)
    elif Path(directory).exists() and any(
        p.name not in ("victim", "clean") and not p.name.startswith(".") for p in directory.iterdir()
    ):
        raise InputError(f"{directory} is not empty and holds no bdjax run. Choose another --out.")
    return None
