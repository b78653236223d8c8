"""Victims: plant a backdoor and write its directory; read one again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import attacks, checkpoint, datasets, models
from bdjax.datasets._files import read_array
from bdjax.engine import FitConfig, fit, parallel
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.experiment import (
    Experiment,
    SplitConfig,
    attack_record,
    config_of,
    digest,
    from_json,
    stream,
    to_json,
)
from bdjax.provenance import environment
from bdjax.recorder import Recorder
from bdjax.types import Data, Model, Task, Variables


@dataclass
class Context:
    """How a run is carried out; none of it changes the numbers."""

    devices: int = 0
    """Local devices to use, 0 for all."""
    tick: Callable[[str, int, int], None] = field(default=lambda stage, done, total: None)
    """Told of progress: stage, steps done, steps in all."""


def train(experiment: Experiment, directory: Path, context: Context | None = None, data: Data | None = None) -> Path:
    """Plant experiment.attack and write the victim directory, unless it is there already.

    A training that was killed goes on from its last epoch, kept beside the directory until it is done.
    Raises InputError when `directory` holds something else.
    """
    context, directory = context or Context(), Path(directory)
    data = data or datasets.load(experiment.dataset)
    with checkpoint.locked(directory):
        hashed = digest(attack_record(experiment, data.fingerprint))
        if directory.exists():
            check_same(directory, checkpoint.read_manifest(directory).get("hash"), hashed)
        else:
            _train(experiment, directory, context, data, hashed)
    return directory


def _train(experiment: Experiment, directory: Path, context: Context, data: Data, hashed: str) -> None:
    model = models.create(experiment.model, data.shape, len(data.classes), experiment.fit.dtype)
    saver = checkpoint.EpochSaver(directory.with_name(f".{directory.name}.training-{hashed[:12]}"))
    clock, watch = Clock(), Recorder(context.tick)
    with parallel.using(context.devices):
        task = Task(
            data.x_train,
            data.y_train,
            model,
            lambda images, labels, key: fit(model, images, labels, experiment.fit, key, watch=watch, saver=saver),
            read_array,
            watch,
        )
        planted = attacks.plant(experiment.attack, experiment.attack_config, task, stream(experiment.seed, "attack"))
    seconds, compiling = clock.read()
    arrays = {"trigger": {**planted.arrays, **_portraits(experiment, data, planted.arrays)}}
    if planted.poison is not None:
        indices = planted.poison.indices
        arrays["poison"] = {
            "indices": indices,
            "labels_before": data.y_train[indices],
            "labels_after": planted.poison.labels,
        }
    manifest = {
        "kind": "victim",
        "hash": hashed,
        **_describe(experiment, data),
        "seconds": {"attack": seconds, "compile": compiling},
        "curve": watch.rows,
        "env": environment(context.devices),
    }
    checkpoint.write_model(directory, manifest, planted.variables, arrays)
    saver.clear()


def _describe(experiment: Experiment, data: Data) -> dict[str, Any]:
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
    """The experiment that a manifest records, with the defense that is asked for now."""
    attack = manifest["attack"]
    return Experiment(
        attack=attack["name"],
        defense=defense,
        dataset=manifest["dataset"]["spec"],
        model=manifest["model"],
        seed=manifest["seed"] if seed is None else seed,
        attack_config=from_json(config_of("attacks", attack["name"]), attack["config"]),
        defense_config=defense_config,
        fit=from_json(FitConfig, manifest["fit"]),
        split=split or SplitConfig(),
    )


def load_model(manifest: dict[str, Any], directory: Path, data: Data) -> tuple[Model, Variables]:
    """The model of a directory and its variables. Raises InputError when `data` is of another shape or class count."""
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    if data.shape != shape or len(data.classes) != classes:
        raise InputError(
            f"{directory} holds a model for {shape} images of {classes} classes; "
            f"{data.name} has {data.shape} and {len(data.classes)}. Give data of the model's shape."
        )
    model = models.create(manifest["model"], data.shape, classes, from_json(FitConfig, manifest["fit"]).dtype)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return model, checkpoint.read_variables(directory, like)


def _portraits(experiment: Experiment, data: Data, arrays: Any) -> dict[str, np.ndarray]:
    """The trigger on a black and on a white image: enough to recognise it without this library."""
    trigger = attacks.trigger_of(experiment.attack, experiment.attack_config, arrays)
    key = stream(experiment.seed, "evaluate")
    return {
        f"on_{name}": attacks.stamped(trigger, experiment.attack_config, np.full((1, *data.shape), v, np.uint8), key)[0]
        for name, v in (("black", 0), ("white", 255))
    }


def check_same(directory: Path, found: str | None, expected: str) -> None:
    """Raise InputError when what stands in `directory` is of another configuration."""
    if found != expected:
        raise InputError(
            f"{directory} holds a run of another configuration (hash {str(found)[:12]}, this one is {expected[:12]}). "
            "Choose another --out."
        )


def check_fingerprint(manifest: dict[str, Any], data: Data, directory: Path) -> None:
    """Raise InputError when `data` is not what the model in `directory` was trained on."""
    if data.fingerprint != manifest["dataset"]["fingerprint"]:
        raise InputError(
            f"the data set {manifest['dataset']['spec']!r} is not the one that {directory} was trained on "
            "(its fingerprint differs). Give the original with --dataset."
        )
