"""Victims: plant a backdoor and write its directory; read one again."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import attacks, datasets, interop, models
from bdjax.config import (
    Experiment,
    SplitConfig,
    attack_record,
    config_of,
    digest,
    from_json,
    stage_key,
    to_json,
)
from bdjax.datasets._files import read_array
from bdjax.engine import FitConfig, fit_with_hook, parallel
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.pipelines import plausibility
from bdjax.pipelines.environment import environment
from bdjax.types import Callback, Data, Key, Model, Poison, Task, TrainingHook, Variables


@dataclass
class Context:
    """How a run is carried out; none of it changes the numbers."""

    devices: int = 0
    """Local devices to use, 0 for all."""
    tick: Callable[[str, int, int], None] = field(default=lambda stage, done, total: None)
    """Told of progress: stage, steps done, steps in all."""
    estimate: bool = False
    """Estimate the attack success rate without the trigger after each defense; the commands do, unless told not to."""
    measured: int = 0
    """Held-out images that a defense's rates are measured on, at most, drawn at random; 0: all. The result says n."""
    store: Path | None = None
    """Directory of victims by hash, where a clean model that an attack begins with is kept and found again."""
    say: Callable[[str], None] = field(default=lambda line: None)
    """Told what a user should know of the data before hours of training: one line each."""

    def waiting(self) -> None:
        """Say that another process makes the same thing."""
        self.tick("waiting for another process that makes the same", 0, 1)


def train(experiment: Experiment, directory: Path, context: Context | None = None, data: Data | None = None) -> Path:
    """Plant experiment.attack and write the victim directory, unless it is there already.

    A training that was killed goes on from its last epoch, kept beside the directory until it is done.
    Raises InputError when `directory` holds something else.
    """
    context, directory = context or Context(), Path(directory)
    data = data or datasets.load(experiment.dataset)
    with checkpoint.locked(directory, context.waiting):
        hashed = digest(attack_record(experiment, data.fingerprint))
        unfinished = directory.with_name(f".{directory.name}.training-{hashed[:12]}")
        if directory.exists():
            check_same(directory, checkpoint.read_record(directory).get("hash"), hashed)
        else:
            _train(experiment, directory, context, data, hashed, unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _train(
    experiment: Experiment, directory: Path, context: Context, data: Data, hashed: str, unfinished: Path
) -> None:
    parts = attacks.parts_of(experiment.attack, experiment.attack_config, {}) if experiment.attack != "clean" else []
    targets = sorted({part.config.target for part, _ in parts})
    for line in [*plausibility.described(data), *(f"warning: {one}" for one in plausibility.of_data(data, targets))]:
        context.say(line)
    clock, callback = Clock(), Recorder(context.tick)
    with parallel.using(context.devices):
        task = task_of(experiment, data, context, callback, unfinished, clock)
        planted = attacks.plant(experiment.attack, experiment.attack_config, task, stage_key(experiment.seed, "attack"))
    seconds, compiling = clock.read()
    arrays = {"trigger": {**planted.arrays, **trigger_previews(experiment, data, planted.arrays)}}
    if planted.poison is not None:
        indices = planted.poison.indices
        arrays["poison"] = {
            "indices": indices,
            "labels_before": data.y_train[indices % len(data.y_train)],
            "labels_after": planted.poison.labels,
        }
    manifest = {
        "kind": "victim",
        "hash": hashed,
        **describe(experiment, data),
        "poison": None if planted.poison is None else _facts(planted.poison),
        "seconds": {"attack": seconds, "compile": compiling},
        "curve": callback.rows,
        "env": environment(context.devices),
    }
    checkpoint.write_model(directory, manifest, planted.variables, arrays)


def poisoned_set(directory: Path, dataset: str | None = None) -> tuple[Data, np.ndarray, np.ndarray, np.ndarray]:
    """The training set that the victim in `directory` learnt from, made again from its manifest and stored arrays.

    Args: dataset: where the data set lies now, if it has moved.
    Returns: (the data set, images [copies * N, H, W, C], labels int32 [copies * N], poisoned positions int32 [n]).
    Raises InputError for an attack that poisons inside the training step (no set exists), for another data set, and
    when the poison is not what the manifest's sha256 says.
    """
    manifest = checkpoint.read_record(directory)
    experiment = experiment_of(manifest, None, None, None, None)
    if not manifest.get("poison"):
        raise InputError(
            f"{directory} has no poisoned training set: {manifest['attack']['name']} changes images in every training "
            "step, drawn anew each time, or none at all."
        )
    data = datasets.load(dataset or experiment.dataset)
    check_fingerprint(manifest, data, directory)
    model = models.create(experiment.model, data.shape, len(data.classes))
    task = Task(data.x_train, data.y_train, model, read_array)
    arrays = attacks.own_arrays(checkpoint.read_arrays(directory, "trigger"))
    made = attacks.poison(
        experiment.attack, experiment.attack_config, task, stage_key(experiment.seed, "attack"), arrays
    )
    if _facts(made)["sha256"] != manifest["poison"]["sha256"]:
        raise InputError(
            f"the poisoned images of {directory} cannot be made again bit for bit here (sha256 differs from the "
            f"manifest's). It was written by {manifest['env'].get('jax', 'another version')} on "
            f"{manifest['env'].get('device', 'another device')}; use the same."
        )
    return data, *attacks.poisoned_set(made, data.x_train, data.y_train), made.indices


def _facts(poison: Poison) -> dict[str, Any]:
    """How many images are poisoned, and a sha256 over which, what they look like and what they are called."""
    digest = hashlib.sha256()
    for array in (poison.indices, poison.images, poison.labels):
        digest.update(str((array.shape, array.dtype.name)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return {"n": len(poison.indices), "copies": poison.copies, "sha256": digest.hexdigest()}


def task_of(
    experiment: Experiment, data: Data, context: Context, callback: Callback, unfinished: Path, clock: Clock
) -> Task:
    """What the attacker holds. Every stage of training keeps its last epoch in `unfinished`/STAGE."""
    own = models.create(experiment.model, data.shape, len(data.classes), experiment.fit.dtype)
    names: set[str] = set()

    def controlled(
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
        if stage in names:
            raise ValueError(f"stage {stage!r} of {experiment.attack} is trained twice; give each its own name")
        names.add(stage)
        return fit_with_hook(
            model or own, images, labels, replace(experiment.fit, **(recipe or {})), key, hook, attacker,
            start=start, stage=stage, saver=checkpoint.EpochSaver(unfinished / stage.replace(" ", "-")),
            callback=callback if stage == "training" else _Ticks(callback),
        )  # fmt: skip

    def fit(images: np.ndarray, labels: np.ndarray, key: Key, **options: Any) -> Variables:
        return controlled(images, labels, key, None, None, **options)[0]

    @cache
    def clean() -> Variables:
        alike = clean_of(experiment)
        if context.store is None:
            return fit(
                data.x_train, data.y_train, attacks.fit_key(stage_key(experiment.seed, "attack")), stage="clean model"
            )
        with clock:  # its time is not this attack's
            directory = directory_of(alike, context.store, data.fingerprint)
            train(alike, directory, context, data)
            return load_model(checkpoint.read_record(directory), directory, data)[1]

    return Task(
        images=data.x_train,
        labels=data.y_train,
        model=own,
        fit=fit,
        read_array=read_array,
        callback=callback,
        fit_with_hook=controlled,
        clean=clean,
    )


class _Ticks(Callback):
    """Progress of a stage whose epochs are not the victim's curve."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def tick(self, stage: str, done: int, total: int) -> None:
        """Pass progress on."""
        self._callback.on_progress(stage, done, total)


def clean_of(experiment: Experiment) -> Experiment:
    """The same victim without an attack: what retraining without poison gives."""
    nothing = config_of("attacks", "clean")()
    return replace(experiment, attack="clean", attack_config=nothing, defense=None, defense_config=None)


def directory_of(experiment: Experiment, store: Path, fingerprint: str) -> Path:
    """Where the victim of an experiment is kept: store/HASH."""
    return Path(store) / digest(attack_record(experiment, fingerprint))[:16]


def describe(experiment: Experiment, data: Data) -> dict[str, Any]:
    """What a manifest says of the model, its training, its attack and its data set."""
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


def experiment_of(
    manifest: dict[str, Any], defense: str | None, defense_config: Any, split: SplitConfig | None, seed: int | None
) -> Experiment:
    """The experiment that a manifest records, with the defense that is asked for now.

    Raises InputError for a model that was imported, of which no attack and no data set are known.
    """
    attack = manifest["attack"]
    if attack is None:
        raise InputError(
            f"{manifest['source']['file']} was imported: no attack and no data set belong to it. `bdjax evaluate` and "
            "`bdjax defend` take them by --attack and --data or --dataset."
        )
    return Experiment(
        attack=attack["name"],
        defense=defense,
        dataset=manifest["dataset"]["spec"],
        model=manifest["model"],
        seed=manifest["seed"] if seed is None else seed,
        attack_config=from_json(config_of("attacks", attack["name"]), attack["config"], "attack.config"),
        defense_config=defense_config,
        fit=from_json(FitConfig, manifest["fit"] or {}, "fit"),
        split=split or SplitConfig(),
    )


def load_model(manifest: dict[str, Any], directory: Path, data: Data) -> tuple[Model, Variables]:
    """The model of a directory and its variables. Raises InputError when `data` is of another shape or class count."""
    check_fits(manifest, directory, data)
    dtype = from_json(FitConfig, manifest["fit"] or {}, "fit").dtype
    with records.reading_record(Path(directory) / checkpoint.MANIFEST):
        model = interop.model_of(manifest, dtype)
        like = jax.eval_shape(model.init, jax.random.key(0))
    return model, checkpoint.read_variables(directory, like)


def check_fits(manifest: dict[str, Any], directory: Path, data: Data) -> None:
    """Raise InputError when `data` is of another shape or class count than the model in `directory`."""
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    if data.shape != shape or len(data.classes) != classes:
        raise InputError(
            f"{directory} holds a model for {shape} images of {classes} classes; {data.name} has {data.shape} and "
            f"{len(data.classes)}. Give data of the model's shape. {plausibility.remedy(manifest, data)}"
        )


def trigger_previews(experiment: Experiment, data: Data, arrays: Any) -> dict[str, np.ndarray]:
    """The trigger (each part's) on a black and on a white image: enough to recognise it without this library."""
    key, found = stage_key(experiment.seed, "evaluate"), {}
    for part, stored in attacks.parts_of(experiment.attack, experiment.attack_config, arrays):
        for name, value in (("black", 0), ("white", 255)):
            paper = np.full((1, *data.shape), value, np.uint8)
            called = f"on_{name}_{part.label}" if part.label else f"on_{name}"
            found[called] = attacks.stamped(part.attack, part.config, paper, key, stored)[0]
    return found


def check_same(directory: Path, found: str | None, expected: str) -> None:
    """Raise InputError when what stands in `directory` is of another configuration."""
    if found != expected:
        raise InputError(
            f"{directory} holds a run of another configuration (another input or other settings: hash "
            f"{str(found)[:12]}, this one is {expected[:12]}). Choose another --out."
        )


def check_fingerprint(manifest: dict[str, Any], data: Data, directory: Path) -> None:
    """Raise InputError when `data` is not what the model in `directory` was trained on."""
    if data.fingerprint != manifest["dataset"]["fingerprint"]:
        raise InputError(
            f"the data set {manifest['dataset']['spec']!r} is not the one that {directory} was trained on "
            "(its fingerprint differs). Give the original with --dataset."
        )
