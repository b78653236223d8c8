"""One cell of a grid with one seed: where its results are, whether it is finished, and how it is carried out.

A cell's directory gets the result.json of its run (or of its victim, without a defense) and a STAGE-HASH.json for each
further stage, with the hash of the stage's settings. Each is written when it is finished and found by the next sweep.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from bdjax import datasets, interop
from bdjax.config import Experiment, attack_record, digest, run_record, to_json
from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.io.files import read_record, sha256
from bdjax.pipelines.artifact import load_model
from bdjax.pipelines.context import Context
from bdjax.pipelines.defend import DefenseRequest, defend
from bdjax.pipelines.environment import environment
from bdjax.pipelines.experiment_options import Cell, CellResult, Stage
from bdjax.pipelines.opening import EvaluationSource, open_recorded
from bdjax.pipelines.results import VictimResult, read_result, write_json
from bdjax.pipelines.run import RunRequest, directory_of, run
from bdjax.pipelines.training import (
    ResolvedTraining,
    clean_experiment,
    resolve_training,
    train_resolved,
    victim_directory,
)


def victim_hash(cell: Cell, seed: int) -> str:
    """A text that cells with the same victim share; they are kept in one shard of a grid."""
    if cell.stored is not None:
        return str(cell.stored)
    return digest(attack_record(_experiment(cell, seed), cell.experiment.dataset))


def trained_victim(cell: Cell, seed: int, out: Path) -> Path | None:
    """The directory of the victim that a cell trains, unless it is there already; None for a stored one.

    Args:
      cell: the cell.
      seed: of the run.
      out: directory of all results.

    Returns:
      out/victims/HASH.

    Raises:
      InputError: the data set cannot be loaded.
    """
    if cell.stored is not None:
        return None
    experiment = _experiment(cell, seed)
    return victim_directory(experiment, _fingerprint(experiment.dataset), out.resolve() / "victims")


def read(cell: Cell, seed: int, out: Path) -> CellResult | None:
    """Read the results of a cell.

    Args:
      cell: the cell.
      seed: of the run.
      out: directory of all results.

    Returns:
      Its results, or None while any of them is missing.

    Raises:
      InputError: a result is damaged, or the data set cannot be loaded.
    """
    directory = _directory(cell, seed, out)
    result = None if directory is None else read_result(directory)
    if directory is None or result is None:
        return None
    stages = {}
    for stage in cell.stages:
        path = _stage_file(directory, stage)
        if not os.path.lexists(path):
            return None
        with records.reading_record(path):
            stages[stage.name] = {**read_record(path)}
    return CellResult(cell, seed, directory, result, stages)


def carry_out(cell: Cell, seed: int, out: Path, context: Context, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Do what is missing of a cell.

    Args:
      cell: the cell.
      seed: replaces that of its experiment.
      out: directory of all results; victims are in out/victims.
      context: devices, progress.
      extra: goes into the result as it is.

    Returns:
      The result of the run, or of the victim.
    """
    context = replace(context, store=out / "victims", measured=cell.measured, estimate=cell.estimate)
    experiment = _experiment(cell, seed)
    result: Mapping[str, Any]
    if cell.stored is not None:
        result, directory = _defend_stored(cell.stored, experiment, out, context, extra)
        model = directory
    elif experiment.defense is None:
        training = resolve_training(experiment, datasets.load(experiment.dataset), store=out / "victims")
        model, directory = training.directory, _victim_result(training, out)
        result = _measure_victim(training, directory, cell.clean, context, extra)
    else:
        result, directory = run(RunRequest(experiment, out, None, cell.clean, extra), context)
        model = directory
    for stage in cell.stages:
        path = _stage_file(directory, stage)
        with checkpoint.locked(path, context.waiting):
            if not path.exists():
                write_json(path, stage.run(model, seed, context))
    return result


def _experiment(cell: Cell, seed: int) -> Experiment:
    return replace(cell.experiment, seed=seed)


@lru_cache
def _fingerprint(dataset: str) -> str:
    return datasets.load(dataset).fingerprint


def _directory(cell: Cell, seed: int, out: Path) -> Path | None:
    """The directory of a cell's results; None while a weight file has not been imported."""
    experiment = _experiment(cell, seed)
    if cell.stored is not None:
        model = _imported(cell.stored, out) if cell.stored.is_file() else cell.stored
        return _stored_result(model, experiment, out) if model.exists() else None
    fingerprint = _fingerprint(experiment.dataset)
    if experiment.defense is None:
        return out / _victim_name(digest(attack_record(experiment, fingerprint)))
    return directory_of(experiment, out, fingerprint)


def _stage_file(directory: Path, stage: Stage) -> Path:
    settings = {"stage": stage.name, **to_json(stage)}
    return directory / f"{stage.name}-{digest(settings)[:8]}.json"


def _victim_name(hash_: str) -> str:
    return digest({"victim": hash_})[:16]


def _victim_result(training: ResolvedTraining, out: Path) -> Path:
    return out / _victim_name(training.hash)


def _measure_victim(
    training: ResolvedTraining, directory: Path, with_clean_model: bool, context: Context, extra: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Train a victim, measure it and (if wanted) a model trained without poison on the same images, and record it."""
    with checkpoint.locked(directory, context.waiting):
        if (finished := read_result(directory)) is not None:
            return finished
        train_resolved(training, context)
        artifact = open_recorded(training.directory, EvaluationSource(data=training.data))
        evaluation = artifact.evaluation.sample(context.measured) if context.measured else artifact.evaluation
        clean = None
        if with_clean_model:
            alike = resolve_training(clean_experiment(training.experiment), training.data, store=context.store)
            train_resolved(alike, context)
            manifest = checkpoint.read_record(alike.directory)
            clean = evaluation.measure(load_model(manifest, alike.directory, training.data)[1])
        experiment = training.experiment
        result: VictimResult = {
            "kind": "victim",
            "attack": experiment.attack,
            "dataset": training.data.name,
            "model": experiment.model,
            "seed": experiment.seed,
            "n_test": len(evaluation.images),
            "n_asr": int(evaluation.eligible.sum()),
            "before": evaluation.measure(artifact.victim.variables),
            "clean": clean,
            "seconds": artifact.manifest["seconds"],
            "attack_config": to_json(experiment.attack_config),
            "fit": to_json(experiment.fit),
            "victim_hash": training.hash,
            "env": environment(context.devices),
            "cell": dict(extra["cell"]),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "result.json", result)
        return result


def _imported(file: Path, out: Path) -> Path:
    """The model directory of a weight file."""
    return out / "imported" / f"{file.stem}-{sha256(file)[:8]}"


def _stored_result(model: Path, experiment: Experiment, out: Path) -> Path:
    return out / digest(run_record(experiment, checkpoint.read_record(model)["hash"]))[:16]


def _defend_stored(
    stored: Path, experiment: Experiment, out: Path, context: Context, extra: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Path]:
    """Defend a victim that exists already, or a weight file after its import."""
    if experiment.defense is None:
        raise InputError(f"a cell with the stored victim {stored} needs a defense.")
    source = EvaluationSource(experiment.dataset)
    if stored.is_file():
        source = replace(source, attack=experiment.attack, attack_config=experiment.attack_config)
        model = _imported(stored, out)
        with checkpoint.locked(model, context.waiting):
            if not model.exists():
                height, width, _ = datasets.load(experiment.dataset).shape
                env = environment(context.devices)
                interop.import_model(stored, model, model=experiment.model, size=(height, width), env=env)
    else:
        model = stored
    request = DefenseRequest(
        model, experiment.defense, experiment.defense_config, experiment.split, experiment.seed, source, extra=extra
    )
    directory = _stored_result(model, experiment, out)
    return defend(request, directory, context), directory
