"""A model directory opened: its manifest, its data set, the model, the held-out images and the defender's view."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from bdjax import interop
from bdjax.config import Experiment, FitConfig, SplitConfig, config_of, from_json
from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.pipelines import plausibility
from bdjax.pipelines.evaluation import Evaluation
from bdjax.types import Arrays, Callback, Data, DefenderView, Model, Variables, Victim


@dataclass(frozen=True)
class ModelArtifact:
    """A model directory with the data set that it is measured on. Model and test images are read when first used."""

    directory: Path
    manifest: Mapping[str, Any]
    """The directory's manifest; of an imported model, completed by the attack and data set it is measured with."""
    experiment: Experiment
    """The training that the manifest records, with the defense and the split asked for now."""
    data: Data
    held_out: bool = True
    """Leave the defender's images out of the test set."""
    given_arrays: Arrays | None = None
    """Trigger arrays for an imported model; None: those in the directory."""

    @property
    def imported(self) -> bool:
        """Whether the model comes from a weight file, so that no attack and no training are recorded."""
        return bool(self.manifest["kind"] == "imported")

    @cached_property
    def trigger_arrays(self) -> Arrays:
        """The stored arrays of the trigger. Raises InputError when they are missing."""
        if self.given_arrays is not None:
            return self.given_arrays
        if not (self.directory / "trigger.npz").is_file():
            raise InputError(f"{self.directory} holds no trigger: trigger.npz is missing. Train the victim anew.")
        return checkpoint.read_arrays(self.directory, "trigger")

    @cached_property
    def victim(self) -> Victim:
        """The model. Raises InputError when the data set has another shape or number of classes."""
        return Victim(*load_model(self.manifest, self.directory, self.data))

    @cached_property
    def evaluation(self) -> Evaluation:
        """Held-out images, clean and triggered. Raises InputError when the trigger is not stored."""
        return Evaluation(self.victim.model, self.data, self.experiment, dict(self.trigger_arrays), self.held_out)

    def view(self, callback: Callback | None = None, trigger: bool = False) -> DefenderView:
        """The defender's clean images; `trigger`: together with the true trigger."""
        evaluation = self.evaluation
        return DefenderView(
            evaluation.clean_images,
            evaluation.clean_labels,
            callback or Callback(),
            evaluation.trigger if trigger else None,
        )


def experiment_of(
    manifest: Mapping[str, Any],
    defense: str | None = None,
    defense_config: Any = None,
    split: SplitConfig | None = None,
    seed: int | None = None,
) -> Experiment:
    """The experiment that a manifest records, with the defense that is asked for now.

    Args:
      manifest: of a victim, or of a model derived from one.
      defense: name of the defense, or None.
      defense_config: its Config; None: the defaults.
      split: the defender's images; None: the defaults.
      seed: of the defense; None: the victim's.

    Returns:
      The experiment.

    Raises:
      InputError: the model was imported, so that no attack and no data set are known.
    """
    attack = manifest["attack"]
    if attack is None:
        raise InputError(
            f"{manifest['source']['file']} was imported: no attack and no data set belong to it. `bdjax evaluate` and "
            "`bdjax defend` take them by --attack and --dataset."
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


def load_model(manifest: Mapping[str, Any], directory: Path, data: Data) -> tuple[Model, Variables]:
    """Read the model in a directory and its variables.

    Args:
      manifest: of the directory.
      directory: of the model.
      data: the data set that it will be used on.

    Returns:
      (model, variables).

    Raises:
      InputError: `data` has another shape or number of classes, or the directory is damaged.
    """
    check_fits(manifest, directory, data)
    dtype = from_json(FitConfig, manifest["fit"] or {}, "fit").dtype
    with records.reading_record(Path(directory) / checkpoint.MANIFEST):
        model = interop.model_of(dict(manifest), dtype)
        like = jax.eval_shape(model.init, jax.random.key(0))
    return model, checkpoint.read_variables(directory, like)


def check_fits(manifest: Mapping[str, Any], directory: Path, data: Data) -> None:
    """Check that a data set has the image shape and number of classes of a model.

    Args:
      manifest: of the model's directory.
      directory: of the model, for the message.
      data: the data set.

    Raises:
      InputError: it has not.
    """
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    if data.shape != shape or len(data.classes) != classes:
        raise InputError(
            f"{directory} holds a model for {shape} images of {classes} classes; {data.name} has {data.shape} and "
            f"{len(data.classes)}. Give data of the model's shape. {plausibility.remedy(manifest, data)}"
        )


def check_same_dataset(manifest: Mapping[str, Any], data: Data, directory: Path) -> None:
    """Check that a data set is the one that a model was trained on, by its fingerprint.

    Args:
      manifest: of the model's directory.
      data: the data set.
      directory: of the model, for the message.

    Raises:
      InputError: it is another one.
    """
    if data.fingerprint != manifest["dataset"]["fingerprint"]:
        raise InputError(
            f"the data set {manifest['dataset']['spec']!r} is not the one that {directory} was trained on "
            "(its fingerprint differs). Give the original with --dataset."
        )
