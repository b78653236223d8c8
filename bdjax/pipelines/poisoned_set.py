"""The poisoned training set of a victim: its record in the manifest, and the set made again from it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import attacks, datasets, models
from bdjax.config import Experiment, stage_key
from bdjax.datasets._files import read_array
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import ModelArtifact, check_same_dataset, experiment_of
from bdjax.types import Callback, Data, Poison, Task


def poisoned_set(directory: Path, dataset: str | None = None) -> tuple[Data, np.ndarray, np.ndarray, np.ndarray]:
    """Make the poisoned training set of a victim again from its manifest and stored arrays.

    Args:
      directory: of the victim.
      dataset: where the data set lies now, if it has moved.

    Returns:
      (data set, images [copies * N, H, W, C], labels int32 [copies * N], poisoned positions int32 [n]).

    Raises:
      InputError: the attack poisons inside the training step, so that no set exists; another data set; or the poisoned
        images differ from those that the manifest's sha256 describes.
    """
    manifest = checkpoint.read_record(directory)
    experiment = experiment_of(manifest)
    _check_poisoned(directory, manifest)
    data = datasets.load(dataset or experiment.dataset)
    check_same_dataset(manifest, data, directory)
    return data, *_poison_again(directory, manifest, experiment, data)


def poisoned_task(artifact: ModelArtifact, callback: Callback) -> Task:
    """Build the task of a defense that trains a new model: the poisoned training set and the victim's architecture.

    Args:
      artifact: a victim, or a model that was purified from one.
      callback: receives the reports of the defense.

    Returns:
      The task; its functions cannot train.

    Raises:
      InputError: as :func:`poisoned_set`, and for an imported model, whose training set is not recorded.
    """
    if artifact.imported:
        raise InputError(
            f"{artifact.directory} is an imported model, whose training set is not recorded, and "
            f"{artifact.experiment.defense} trains on it. Use a defense that purifies, or the directory of a victim."
        )
    _check_poisoned(artifact.directory, artifact.manifest)
    images, labels, _ = _poison_again(artifact.directory, artifact.manifest, artifact.experiment, artifact.data)
    return Task(images, labels, artifact.victim.model, read_array, callback)


def _check_poisoned(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise InputError for a victim of an attack that has no poisoned training set."""
    if not manifest.get("poison"):
        raise InputError(
            f"{directory} has no poisoned training set: {manifest['attack']['name']} changes images in every training "
            "step, drawn anew each time, or none at all."
        )


def _poison_again(
    directory: Path, manifest: Mapping[str, Any], experiment: Experiment, data: Data
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images, labels and poisoned positions of :func:`poisoned_set`.

    Args:
      directory: of the victim.
      manifest: its manifest, which records a poisoned training set.
      experiment: the recorded training.
      data: the data set.

    Returns:
      (images, labels, positions).

    Raises:
      InputError: the poisoned images differ from those that the manifest describes.
    """
    model = models.create(experiment.model, data.shape, len(data.classes))
    task = Task(data.x_train, data.y_train, model, read_array)
    arrays = attacks.without_previews(checkpoint.read_arrays(directory, "trigger"))
    key = stage_key(int(manifest["seed"]), "attack")
    poison = attacks.poison(experiment.attack, experiment.attack_config, task, key, arrays)
    if poison_record(poison)["sha256"] != manifest["poison"]["sha256"]:
        raise InputError(
            f"the poisoned images of {directory} cannot be made again bit for bit here (sha256 differs from the "
            f"manifest's). It was written by {manifest['env'].get('jax', 'another version')} on "
            f"{manifest['env'].get('device', 'another device')}; use the same."
        )
    return *attacks.poisoned_set(poison, data.x_train, data.y_train), poison.indices


def poison_record(poison: Poison) -> dict[str, Any]:
    """Number of poisoned images and copies, and a sha256 over positions, pixels and labels."""
    sha256 = hashlib.sha256()
    for array in (poison.indices, poison.images, poison.labels):
        sha256.update(str((array.shape, array.dtype.name)).encode())
        sha256.update(np.ascontiguousarray(array).data)
    return {"n": len(poison.indices), "copies": poison.copies, "sha256": sha256.hexdigest()}
