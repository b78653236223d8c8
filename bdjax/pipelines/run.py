"""The whole job: plant a backdoor, write the victim, read it again, defend it, measure and record.

Training and defense are separate functions over directories, so two processes give the numbers of one. Everything is
looked up once, into a :class:`ResolvedRun`; results are found by the hash of their configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bdjax import datasets, registry
from bdjax.config import Experiment, attack_record, digest, run_record
from bdjax.errors import InputError
from bdjax.pipelines.context import Context
from bdjax.pipelines.defend import DefenseRequest, defend, finished_result
from bdjax.pipelines.evaluation import clean_indices
from bdjax.pipelines.opening import EvaluationSource
from bdjax.pipelines.results import RunResult
from bdjax.pipelines.training import ResolvedTraining, clean_experiment, resolve_training, train_resolved


@dataclass(frozen=True)
class RunRequest:
    """An experiment and where its results go."""

    experiment: Experiment
    root: Path = Path("runs")
    """Results go to root/HASH, victims to root/victims/HASH, so that a grid trains each victim once."""
    out: Path | None = None
    """Put this run's result into that directory instead, and its victim into out/victim."""
    with_clean_model: bool = False
    """Also train the same model without poison, for the score; it is kept beside the victim."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Goes into the result as it is (which cell of a grid this is)."""


@dataclass(frozen=True)
class ResolvedRun:
    """An experiment whose methods, data, hashes and directories are known and checked."""

    experiment: Experiment
    victim: ResolvedTraining
    clean: ResolvedTraining | None
    """The same training without poison, when it is wanted."""
    hash: str
    directory: Path
    keeps_victims: bool
    """Whether victims are kept by their hash, for other runs to find."""
    extra: Mapping[str, Any]


def resolve_run(request: RunRequest) -> ResolvedRun:
    """Look up methods and data, compute hashes and directories, and refuse what cannot work before any training.

    Raises InputError for an unknown method, a method that only detects, and a split that does not fit the data.
    """
    experiment, out = request.experiment, request.out
    if experiment.defense is None:
        raise InputError("a run needs a defense. Name one, or use `bdjax train` to train the victim alone.")
    registry.load("defenses", experiment.defense)
    data = datasets.load(experiment.dataset)
    store = Path(request.root) / "victims"
    victim = resolve_training(experiment, data, out / "victim" if out else None, store)
    clean = None
    if request.with_clean_model:
        clean = resolve_training(clean_experiment(experiment), data, out / "clean" if out else None, store)
    hash_ = digest(run_record(experiment, victim.hash))
    clean_indices(experiment.split, data, experiment.seed)  # refuses a split that does not fit
    return ResolvedRun(
        experiment, victim, clean, hash_, out or Path(request.root) / hash_[:16], out is None, request.extra
    )


def run(request: RunRequest, context: Context | None = None) -> tuple[RunResult, Path]:
    """Train (or find) the victim and defend it from its directory.

    Args:
      request: the experiment and where its results go.
      context: devices, progress, what is measured.

    Returns:
      (result, directory of the run).

    Raises:
      InputError: for what cannot work.
    """
    resolved, context = resolve_run(request), context or Context()
    finished = finished_result(resolved.directory, resolved.hash)
    if finished is not None and (resolved.clean is None or finished["clean"] is not None):
        return finished, resolved.directory
    if resolved.keeps_victims:
        context = replace(context, store=resolved.victim.directory.parent)
    train_resolved(resolved.victim, context)
    if resolved.clean is not None:
        train_resolved(resolved.clean, context)
    experiment = resolved.experiment
    defense = DefenseRequest(
        resolved.victim.directory,
        experiment.defense or "",
        experiment.defense_config,
        split=experiment.split,
        source=EvaluationSource(data=resolved.victim.data),
        clean_model=None if resolved.clean is None else resolved.clean.directory,
        extra=resolved.extra,
    )
    return defend(defense, resolved.directory, context), resolved.directory


def directory_of(experiment: Experiment, root: Path, fingerprint: str | None = None) -> Path:
    """Where :func:`run` puts the result of an experiment.

    Args:
      experiment: attack, defense, model, recipe, split and seed.
      root: directory of all results.
      fingerprint: of the data set, when it is known; None: it is loaded.

    Returns:
      root/HASH.
    """
    fingerprint = fingerprint or datasets.load(experiment.dataset).fingerprint
    return Path(root) / digest(run_record(experiment, digest(attack_record(experiment, fingerprint))))[:16]
