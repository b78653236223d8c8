"""The main job: plant a backdoor, checkpoint the victim, load it, defend it, measure, and write it all down.

Phases are separate functions over directories, so two processes give the numbers of one:
`victim.train` makes a victim directory, :func:`defend` reads it. Results are content-addressed.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from bdjax import datasets
from bdjax.config import Experiment, SplitConfig, attack_record, digest, run_record, stage_key, to_json
from bdjax.defenses import needs_trigger, purifier
from bdjax.defenses._guard import guarded, split_off
from bdjax.engine import parallel
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock, peak_memory
from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.io.files import read_record
from bdjax.pipelines import plausibility, verdicts
from bdjax.pipelines import victim as victims
from bdjax.pipelines.artifact import ModelArtifact, open_artifact, read_clean, read_recorded
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import clean_indices
from bdjax.pipelines.victim import Context, check_fingerprint, check_same, experiment_of, train
from bdjax.types import Data

_CURVE = 1000
"""Held-out images, at most, that a model is measured on after each round of a defense, clean and triggered."""


def defend(
    victim: Path,
    defense: str,
    defense_config: Any,
    directory: Path,
    *,
    split: SplitConfig | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    clean: Path | None = None,
    context: Context | None = None,
    extra: dict[str, Any] | None = None,
    data: Data | None = None,
    attack: str | None = None,
    attack_config: Any = None,
) -> dict[str, Any]:
    """Defend the model in a victim directory, write the cleaned model and the numbers, return the result.

    Args:
      victim: directory that :func:`train` wrote; its data set is looked up again and must be the same.
      directory: gets config.json, env.json, metrics.jsonl, arrays.npz, purified/ and, last, result.json.
      seed: of the defense; default the victim's.
      dataset: where the data set lies now, when it has moved.
      clean: directory of a model trained alike without poison, for the score; default the victim's neighbour, by its
        hash, if it is there. A finished result without a score gets it.
      extra: goes into the result as it is (which cell of which paper this is).
      attack, attack_config: what an imported model is measured with, on `dataset`; None: images are left as they are.
    """
    context, victim, directory = context or Context(), Path(victim), Path(directory)
    module = purifier(defense)
    artifact = open_artifact(
        victim, defense, defense_config, split=split, seed=seed, dataset=dataset, data=data, attack=attack,
        attack_config=attack_config,
    )  # fmt: skip
    manifest, experiment = artifact.manifest, artifact.experiment
    record = run_record(experiment, manifest["hash"])
    hashed = digest(record)
    clean = clean or _neighbour(victim, manifest)
    finished = finished_result(directory, hashed)
    if finished is not None and (clean is None or finished.get("clean") is not None):
        return finished
    with checkpoint.locked(directory, context.waiting):
        if (finished := finished_result(directory, hashed)) is None:
            return _defend(artifact, module, directory, record, clean, context, extra)
        if clean is not None and finished.get("clean") is None:
            beside = artifact.evaluation.measure(read_clean(clean, artifact).victim.variables)
            with records.reading_record(directory / "result.json"):
                finished |= verdicts.beside(beside, finished["before"], finished["after"])
            _write_json(directory / "result.json", finished)
        return finished


def _defend(
    artifact: ModelArtifact, module: Any, directory: Path, record: dict[str, Any], clean: Path | None, context: Context,
    extra: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    victim, manifest, experiment, hashed = artifact.directory, artifact.manifest, artifact.experiment, digest(record)
    evaluation = artifact.evaluation
    if context.measured:
        evaluation = evaluation.sample(context.measured)
    guesses = evaluation.predictions(artifact.victim.variables)
    before = evaluation.rates(*guesses)
    remarks = plausibility.about(artifact.data, manifest, victim, guesses[0], evaluation.labels, evaluation.targets)
    rates = evaluation.measure(read_clean(clean, artifact).victim.variables) if clean else None
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", record)
    env = environment(context.devices)
    _write_json(directory / "env.json", env)
    lines = directory / "metrics.jsonl"
    checkpoint.write_text(lines, "")

    clock = Clock()
    curve = evaluation.sample(_CURVE)
    callback = Recorder(context.tick, clock, curve.measure, lines if checkpoint.is_main_process() else None)
    with parallel.using(context.devices):
        key = stage_key(experiment.seed, "defense")
        split = experiment.split
        view = artifact.view(callback, needs_trigger(module, experiment.defense_config))
        view = split_off(view, split.validation, jax.random.fold_in(stage_key(experiment.seed, "split"), 1))
        cleaned = guarded(module, experiment.defense_config, artifact.victim, view, key, split.largest_drop)
        jax.block_until_ready(cleaned)
    seconds, compiling = clock.read()
    after = evaluation.measure(cleaned)
    memory, what = peak_memory()
    clock, found, verdict = Clock(), callback.scores, None
    if found is None and hasattr(module, "detect"):
        with parallel.using(context.devices):
            found = module.detect(experiment.defense_config, artifact.victim, artifact.view(), key)
    if found is not None:
        known = None if manifest["kind"] == "imported" else experiment.attack
        verdict = {**verdicts.verdict(found, known, evaluation), "seconds": clock.read()[0]}
    clock = Clock()
    estimated = verdicts.estimate(artifact, cleaned, view, callback, context) if context.estimate else None
    result = {
        "attack": experiment.attack,
        "defense": experiment.defense,
        "dataset": artifact.data.name,
        "model": artifact.victim.model.name,
        "seed": experiment.seed,
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        "n_defender": len(evaluation.clean_labels),
        "n_validation": 0 if view.validation is None else len(view.validation.labels),
        "before": before,
        "after": after,
        **verdicts.beside(rates, before, after),
        "estimate": estimated,
        "detection": verdict,
        "seconds": {
            "attack": manifest["seconds"]["attack"],
            "defense": seconds,
            "compile": manifest["seconds"]["compile"] + compiling,
            "estimate": clock.read()[0],
        },
        "peak_memory_bytes": memory,
        "peak_memory_of": what,
        **remarks,
        "rounds": callback.rows,
        "n_rounds": len(curve.images),
        "attack_config": to_json(experiment.attack_config),
        "defense_config": to_json(experiment.defense_config),
        "fit": to_json(experiment.fit),
        "split": to_json(experiment.split),
        "victim_hash": manifest["hash"],
        "config_hash": hashed,
        "env": env,
        **(extra or {}),
    }
    pictures = {**evaluation.pictures(), **callback.arrays, "clean_indices": evaluation.clean_indices}
    checkpoint.write_arrays(directory / "arrays.npz", pictures)
    purified = {
        **manifest,
        "kind": "purified",
        "hash": hashed,
        "victim_hash": manifest["hash"],
        "defense": {"name": experiment.defense, "config": to_json(experiment.defense_config), "seed": experiment.seed},
        "split": to_json(experiment.split),
        "env": env,
    }
    shutil.rmtree(directory / "purified", ignore_errors=True)  # of a run that was killed before its result stood
    checkpoint.write_model(
        directory / "purified",
        purified,
        cleaned,
        {
            "trigger": artifact.trigger_arrays,
            "split": {"indices": evaluation.clean_indices},
            **({"original": checkpoint.read_arrays(victim, "original")} if (victim / "original.npz").exists() else {}),
        },
    )
    _write_json(directory / "result.json", result)
    return result


def _neighbour(victim: Path, manifest: dict[str, Any]) -> Path | None:
    """The clean model that `run` keeps beside this victim, or None."""
    if manifest["kind"] == "imported":
        return None
    alike = victims.clean_of(experiment_of(manifest, None, None, None, None))
    found = victims.directory_of(alike, victim.parent, manifest["dataset"]["fingerprint"])
    return found if (found / "manifest.json").is_file() else None


def evaluate(
    directory: Path, dataset: str | None = None, attack: str | None = None, attack_config: Any = None
) -> dict[str, Any]:
    """Accuracy and ASR of a victim or purified directory, on its own data set or another of its shape.

    An imported model needs `dataset`, and for an ASR the attack that it is measured with.
    """
    directory = checkpoint.model_directory(directory)
    artifact = read_recorded(directory, dataset=dataset, attack=attack, attack_config=attack_config)
    imported = artifact.manifest["kind"] == "imported"
    if dataset is not None:
        artifact = replace(artifact, held_out=False)
    elif not imported:
        check_fingerprint(artifact.manifest, artifact.data, directory)
    evaluation, data = artifact.evaluation, artifact.data
    guesses = evaluation.predictions(artifact.victim.variables)
    return {
        "directory": str(directory),
        "kind": artifact.manifest["kind"],
        "attack": None if imported and attack is None else artifact.experiment.attack,
        "dataset": data.name,
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        **evaluation.rates(*guesses),
        **plausibility.about(data, artifact.manifest, directory, guesses[0], evaluation.labels, evaluation.targets),
    }


def run(
    experiment: Experiment,
    root: Path,
    out: Path | None = None,
    context: Context | None = None,
    extra: dict[str, Any] | None = None,
    clean: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Train (or find) the victim, defend it from its checkpoint. Returns (result, its directory).

    Args:
      root: results go to root/HASH, victims to root/victims/HASH, so a grid trains each victim once.
      out: put this run's result into that directory instead, and its victim into out/victim.
      clean: train the same model without poison, too, for the score; it is kept beside the victim.
    """
    purifier(experiment.defense or "")
    data = datasets.load(experiment.dataset)
    directory = out or directory_of(experiment, root, data.fingerprint)
    victim = out / "victim" if out else victim_directory_of(experiment, root, data.fingerprint)
    hashed = digest(run_record(experiment, _victim_hash(experiment, data.fingerprint)))
    finished = finished_result(directory, hashed)
    if finished is not None and not (clean and finished.get("clean") is None):
        return finished, directory
    clean_indices(experiment.split, data, experiment.seed)  # refuse a bad split before hours of training
    context = context or Context()
    context_of_victims = context if out else replace(context, store=victim.parent)
    train(experiment, victim, context_of_victims, data)
    unpoisoned = None
    if clean:
        alike = victims.clean_of(experiment)
        unpoisoned = out / "clean" if out else victims.directory_of(alike, victim.parent, data.fingerprint)
        train(alike, unpoisoned, context_of_victims, data)
    result = defend(
        victim,
        experiment.defense or "",
        experiment.defense_config,
        directory,
        split=experiment.split,
        clean=unpoisoned,
        context=context,
        extra=extra,
        data=data,
    )
    return result, directory


def victim_directory_of(experiment: Experiment, root: Path, fingerprint: str | None = None) -> Path:
    """Where :func:`run` keeps the victim of an experiment: root/victims/HASH."""
    fingerprint = fingerprint or datasets.load(experiment.dataset).fingerprint
    return victims.directory_of(experiment, Path(root) / "victims", fingerprint)


def directory_of(experiment: Experiment, root: Path, fingerprint: str | None = None) -> Path:
    """Where :func:`run` puts the result of an experiment: root/HASH."""
    return Path(root) / digest(run_record(experiment, _victim_hash(experiment, fingerprint)))[:16]


def _victim_hash(experiment: Experiment, fingerprint: str | None) -> str:
    return digest(attack_record(experiment, fingerprint or datasets.load(experiment.dataset).fingerprint))


def defense_directory_of(
    victim: Path,
    defense: str,
    defense_config: Any,
    split: SplitConfig,
    seed: int | None,
    root: Path,
    **imported: Any,
) -> Path:
    """Where a defense of the model in `victim` belongs: root/HASH, the same as that of the whole run.

    `imported`: dataset, attack and attack_config, as :func:`defend` takes them.
    """
    manifest = checkpoint.read_record(victim)
    if manifest["kind"] == "imported":
        artifact = open_artifact(victim, defense, defense_config, split=split, seed=seed, **imported)
        manifest, experiment = artifact.manifest, artifact.experiment
    else:
        experiment = experiment_of(manifest, defense, defense_config, split, seed)
    return Path(root) / digest(run_record(experiment, manifest["hash"]))[:16]


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result.json of a finished run, or None. Raises InputError when it is damaged."""
    path = Path(directory) / "result.json"
    if not os.path.lexists(path):
        return None
    with records.reading_record(path):
        return {**read_record(path)}


def _write_json(path: Path, value: Any) -> None:
    checkpoint.write_text(path, json.dumps(value, indent=1) + "\n")


def finished_result(directory: Path, expected: str) -> dict[str, Any] | None:
    """The result of this very configuration, or None when `directory` is free for it; InputError when it is not.

    A directory without a result may be an interrupted run of the same configuration, or new, or empty.
    """
    if (finished := read_result(directory)) is not None:
        check_same(directory, finished.get("config_hash"), expected)
        return finished
    config = Path(directory) / "config.json"
    if config.is_file():
        try:
            found = digest(read_record(config))
        except (ValueError, RecursionError):
            found = None
        check_same(directory, found, expected)
    elif Path(directory).exists() and any(
        p.name not in ("victim", "clean") and not p.name.startswith(".") for p in directory.iterdir()
    ):
        raise InputError(f"{directory} is not empty and holds no bdjax run. Choose another --out.")
    return None
