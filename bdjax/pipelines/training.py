"""Train victims: plant a backdoor in a model and write its directory, or continue a training that was interrupted."""

import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import attacks, datasets, models
from bdjax.config import Experiment, attack_record, config_of, digest, stage_key, to_json
from bdjax.datasets._files import read_array
from bdjax.engine import fit_with_hook, parallel
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import plausibility
from bdjax.pipelines.artifact import load_model
from bdjax.pipelines.context import Context
from bdjax.pipelines.environment import environment
from bdjax.pipelines.poisoned_set import poison_record
from bdjax.types import Backdoor, Callback, Data, Key, Model, Task, TrainingHook, Variables


@dataclass(frozen=True)
class ResolvedTraining:
    """A training whose data are loaded and whose hash and directory are known."""

    experiment: Experiment
    data: Data
    hash: str
    """sha256 of everything that decides the victim."""
    directory: Path
    """Where the victim is written, or was written before."""

    @property
    def unfinished(self) -> Path:
        """Where the epochs of an interrupted training are kept."""
        return self.directory.with_name(f".{self.directory.name}.training-{self.hash[:12]}")


def resolve_training(
    experiment: Experiment, data: Data, directory: Path | None = None, store: Path | None = None
) -> ResolvedTraining:
    """Find the hash and the directory of a victim.

    Args:
      experiment: its attack, model, recipe and seed.
      data: the loaded data set.
      directory: where to write it; None: store/HASH.
      store: directory of victims by hash.

    Returns:
      The resolved training.

    Raises:
      InputError: the attack plants nothing.
    """
    attacks.load_planting(experiment.attack)  # refuses an attack that plants nothing
    hash_ = digest(attack_record(experiment, data.fingerprint))
    directory = directory or victim_directory(experiment, data.fingerprint, store or Path())
    return ResolvedTraining(experiment, data, hash_, Path(directory))


def victim_directory(experiment: Experiment, fingerprint: str, store: Path) -> Path:
    """Where the victim of an experiment is kept by its hash.

    Args:
      experiment: its attack, model, recipe and seed.
      fingerprint: of the data set.
      store: directory of victims.

    Returns:
      store/HASH.
    """
    return Path(store) / digest(attack_record(experiment, fingerprint))[:16]


def train(experiment: Experiment, directory: Path, context: Context | None = None, data: Data | None = None) -> Path:
    """Plant the attack of an experiment and write the victim's directory, unless it is there already.

    A training that was killed continues from its last epoch, which is kept beside the directory until it is finished.

    Args:
      experiment: attack, model, recipe and seed.
      directory: of the victim.
      context: devices, progress.
      data: the data set, when it is loaded already.

    Returns:
      The directory.

    Raises:
      InputError: `directory` holds something else, or the attack does not fit the data.
    """
    data = data or datasets.load(experiment.dataset)
    return train_resolved(resolve_training(experiment, data, directory), context or Context())


def train_resolved(training: ResolvedTraining, context: Context) -> Path:
    """Train a resolved victim unless its directory is there already; return the directory.

    Raises InputError when the directory holds something else.
    """
    with checkpoint.locked(training.directory, context.waiting):
        if training.directory.exists():
            recorded = checkpoint.read_record(training.directory).get("hash")
            check_same_run(training.directory, recorded, training.hash)
        else:
            _train(training, context)
        shutil.rmtree(training.unfinished, ignore_errors=True)
    return training.directory


def _train(training: ResolvedTraining, context: Context) -> None:
    experiment, data = training.experiment, training.data
    _describe_data(experiment, data, context)
    clock, recorder = Clock(), Recorder(context.tick)
    with parallel.using(context.devices):
        task = task_of(experiment, data, context, recorder, training.unfinished, clock)
        backdoor = attacks.plant(
            experiment.attack, experiment.attack_config, task, stage_key(experiment.seed, "attack")
        )
    seconds, compiling = clock.read()
    manifest = {
        "kind": "victim",
        "hash": training.hash,
        **training_record(experiment, data),
        "poison": None if backdoor.poison is None else poison_record(backdoor.poison),
        "seconds": {"attack": seconds, "compile": compiling},
        "curve": recorder.rows,
        "env": environment(context.devices),
    }
    checkpoint.write_model(training.directory, manifest, backdoor.variables, _stored_arrays(experiment, data, backdoor))


def _describe_data(experiment: Experiment, data: Data, context: Context) -> None:
    """Tell the user what is odd about the data before a long training."""
    parts = attacks.parts_of(experiment.attack, experiment.attack_config, {}) if experiment.attack != "clean" else []
    targets = sorted({part.config.target for part, _ in parts})
    warnings = [f"warning: {line}" for line in plausibility.of_data(data, targets)]
    for line in [*plausibility.described(data), *warnings]:
        context.say(line)


def _stored_arrays(experiment: Experiment, data: Data, backdoor: Backdoor) -> dict[str, dict[str, np.ndarray]]:
    """The trigger's arrays and previews and, of a poisoned training set, which images were relabelled and how."""
    trigger = {**backdoor.arrays, **trigger_previews(experiment, data, backdoor.arrays)}
    if backdoor.poison is None:
        return {"trigger": trigger}
    indices = backdoor.poison.indices
    poison = {
        "indices": indices,
        "labels_before": data.y_train[indices % len(data.y_train)],
        "labels_after": backdoor.poison.labels,
    }
    return {"trigger": trigger, "poison": poison}


def task_of(
    experiment: Experiment, data: Data, context: Context, callback: Callback, unfinished: Path, clock: Clock
) -> Task:
    """Build what the attacker holds: the training set, the model and functions that train it by the user's recipe.

    Args:
      experiment: attack, model, recipe and seed.
      data: the data set.
      context: where a clean model is kept, when the attack starts from one.
      callback: called during the stage "training"; other stages only show their progress.
      unfinished: every stage keeps its last epoch in unfinished/STAGE.
      clock: the time that a clean model takes is not counted.

    Returns:
      The task.
    """
    trainer = _Trainer(experiment, data, callback, unfinished)

    @cache
    def clean() -> Variables:
        if context.store is None:
            key = attacks.fit_key(stage_key(experiment.seed, "attack"))
            return trainer.fit(data.x_train, data.y_train, key, stage="clean model")
        with clock:
            training = resolve_training(clean_experiment(experiment), data, store=context.store)
            train_resolved(training, context)
            return load_model(checkpoint.read_record(training.directory), training.directory, data)[1]

    return Task(
        images=data.x_train,
        labels=data.y_train,
        model=trainer.model,
        fit=trainer.fit,
        read_array=read_array,
        callback=callback,
        fit_with_hook=trainer.fit_with_hook,
        clean=clean,
    )


class _Trainer:
    """The training functions of a :class:`Task`: each stage has its name and keeps its last epoch."""

    def __init__(self, experiment: Experiment, data: Data, callback: Callback, unfinished: Path) -> None:
        self.model = models.create(experiment.model, data.shape, len(data.classes), experiment.fit.dtype)
        self._experiment, self._callback, self._unfinished = experiment, callback, unfinished
        self._stages: set[str] = set()

    def fit_with_hook(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        key: Key,
        hook: TrainingHook | None,
        attacker: Any,
        *,
        stage: str = "training",
        start: Variables | None = None,
        recipe: dict[str, Any] | None = None,
        model: Model | None = None,
    ) -> tuple[Variables, Any]:
        """`Task.fit_with_hook`."""
        if stage in self._stages:
            name = self._experiment.attack
            raise ValueError(f"stage {stage!r} of {name} is trained twice; give each its own name")
        self._stages.add(stage)
        config = replace(self._experiment.fit, **(recipe or {}))
        return fit_with_hook(
            model or self.model, images, labels, config, key, hook, attacker,
            start=start, stage=stage, saver=checkpoint.EpochSaver(self._unfinished / stage.replace(" ", "-")),
            callback=self._callback if stage == "training" else _ProgressOnly(self._callback),
        )  # fmt: skip

    def fit(self, images: np.ndarray, labels: np.ndarray, key: Key, **options: Any) -> Variables:
        """`Task.fit`."""
        return self.fit_with_hook(images, labels, key, None, None, **options)[0]


class _ProgressOnly(Callback):
    """Forwards the progress of a stage whose epochs are not part of the victim's curve."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Forward the progress."""
        self._callback.on_progress(stage, done, total)


def clean_experiment(experiment: Experiment) -> Experiment:
    """The same training without an attack."""
    config = config_of("attacks", "clean")()
    return replace(experiment, attack="clean", attack_config=config, defense=None, defense_config=None)


def training_record(experiment: Experiment, data: Data) -> dict[str, Any]:
    """What a manifest records of the model, its training, its attack and its data set."""
    return {
        "model": experiment.model,
        "shape": data.shape,
        "classes": data.classes,
        "seed": experiment.seed,
        "fit": to_json(experiment.fit),
        "attack": {"name": experiment.attack, "config": to_json(experiment.attack_config)},
        "dataset": {
            "spec": experiment.dataset,
            "name": data.name,
            "fingerprint": data.fingerprint,
            "n_train": len(data.x_train),
            "n_test": len(data.x_test),
        },
    }


def trigger_previews(experiment: Experiment, data: Data, arrays: Any) -> dict[str, np.ndarray]:
    """Put the trigger (that of each part) on a black and a white image, so that it can be recognised without bdjax.

    Args:
      experiment: its attack and seed.
      data: gives the shape of an image.
      arrays: of the trigger.

    Returns:
      {"on_black", "on_white"}: uint8 [H, W, C]; with the label of each part behind the name where there are several.
    """
    key, previews = stage_key(experiment.seed, "evaluate"), {}
    for part, stored in attacks.parts_of(experiment.attack, experiment.attack_config, arrays):
        for colour, value in (("black", 0), ("white", 255)):
            paper = np.full((1, *data.shape), value, np.uint8)
            name = f"on_{colour}_{part.label}" if part.label else f"on_{colour}"
            previews[name] = attacks.stamped(part.attack, part.config, paper, key, stored)[0]
    return previews


def check_same_run(directory: Path, recorded: str | None, expected: str) -> None:
    """Check that a directory holds the run of a configuration.

    Args:
      directory: of the run, for the message.
      recorded: hash of the configuration that it holds.
      expected: hash of the configuration that is asked for.

    Raises:
      InputError: they differ.
    """
    if recorded != expected:
        raise InputError(
            f"{directory} holds a run of another configuration (another input or other settings: hash "
            f"{str(recorded)[:12]}, this one is {expected[:12]}). Choose another --out."
        )
