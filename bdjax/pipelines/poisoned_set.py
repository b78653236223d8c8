"""The poisoned training set of a victim: its record in the manifest, and the set made again from it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import attacks, datasets, models
from bdjax.config import stage_key
from bdjax.datasets._files import read_array
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import check_same_dataset, experiment_of
from bdjax.types import Data, Poison, Task


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
    if not manifest.get("poison"):
        raise InputError(
            f"{directory} has no poisoned training set: {manifest['attack']['name']} changes images in every training "
            "step, drawn anew each time, or none at all."
        )
    data = datasets.load(dataset or experiment.dataset)
    check_same_dataset(manifest, data, directory)
    model = models.create(experiment.model, data.shape, len(data.classes))
    task = Task(data.x_train, data.y_train, model, read_array)
    arrays = attacks.without_previews(checkpoint.read_arrays(directory, "trigger"))
    key = stage_key(experiment.seed, "attack")
    poison = attacks.poison(experiment.attack, experiment.attack_config, task, key, arrays)
    if poison_record(poison)["sha256"] != manifest["poison"]["sha256"]:
        raise InputError(
            f"the poisoned images of {directory} cannot be made again bit for bit here (sha256 differs from the "
            f"manifest's). It was written by {manifest['env'].get('jax', 'another version')} on "
            f"{manifest['env'].get('device', 'another device')}; use the same."
        )
    return data, *attacks.poisoned_set(poison, data.x_train, data.y_train), poison.indices


def poison_record(poison: Poison) -> dict[str, Any]:
    """Number of poisoned images and copies, and a sha256 over positions, pixels and labels."""
    sha256 = hashlib.sha256()
    for array in (poison.indices, poison.images, poison.labels):
        sha256.update(str((array.shape, array.dtype.name)).encode())
        sha256.update(np.ascontiguousarray(array).data)
    return {"n": len(poison.indices), "copies": poison.copies, "sha256": sha256.hexdigest()}
