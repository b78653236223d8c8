"""Open model directories: to defend them, as they were recorded, or several that are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdjax import attacks, datasets, registry
from bdjax.attacks._poisoning import check_target
from bdjax.config import Experiment, SplitConfig, attack_record, digest, from_json, stage_key
from bdjax.datasets._files import read_array
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import plausibility
from bdjax.pipelines.artifact import ModelArtifact, check_fits, check_same_dataset, experiment_of
from bdjax.pipelines.training import training_record, trigger_previews
from bdjax.types import Arrays, Data, Model, NeedsTraining, Task


@dataclass(frozen=True)
class EvaluationSource:
    """The data set and the attack that a model is measured with, where they are not the recorded ones."""

    dataset: str | None = None
    """Where the data set lies now, when it has moved; an imported model, which records none, needs it."""
    data: Data | None = None
    """The set itself, when it is loaded already."""
    attack: str | None = None
    """For an imported model: the attack whose trigger is put on the test images; None: accuracy only."""
    attack_config: Any = None
    """Its Config; None: the defaults."""

    def load(self, recorded: str | None = None) -> Data:
        """The data set: the loaded one, else `dataset`, else the recorded spec."""
        return self.data or datasets.load(self.dataset or recorded or "")


def open_artifact(
    directory: Path,
    defense: str,
    defense_config: Any,
    *,
    split: SplitConfig | None = None,
    seed: int | None = None,
    source: EvaluationSource | None = None,
) -> ModelArtifact:
    """Open the model in `directory` to defend it.

    Args:
      directory: of a victim, an imported or a purified model.
      defense: name of the defense.
      defense_config: its Config.
      split: the defender's images; None: the defaults.
      seed: of the defense; None: the victim's.
      source: the data set (and, for an imported model, the attack) that it is measured with.

    Returns:
      The artifact with the experiment of this defense.

    Raises:
      InputError: a damaged directory, or another data set than the model was trained on.
    """
    source, manifest = source or EvaluationSource(), checkpoint.read_record(directory)
    if manifest["kind"] == "imported":
        completed, data, arrays = _complete(directory, manifest, source, seed or 0)
        experiment = experiment_of(completed, defense, defense_config, split, seed)
        return ModelArtifact(directory, completed, experiment, data, given_arrays=arrays)
    _refuse_attack(directory, manifest, source.attack)
    experiment = experiment_of(manifest, defense, defense_config, split, seed)
    data = plausibility.aligned(manifest, directory, source.load(experiment.dataset))
    check_same_dataset(manifest, data, directory)
    return ModelArtifact(directory, manifest, experiment, data)


def open_recorded(directory: Path, source: EvaluationSource | None = None) -> ModelArtifact:
    """Open a model directory as it was recorded; a purified model's test set leaves the defender's images out.

    Any data set of the model's shape is accepted: check with :func:`check_same_dataset` where it must be the recorded
    one.

    Args:
      directory: of a victim, an imported, purified or re-activated model.
      source: the data set, and the attack for an imported model or for what a defense made of one.

    Returns:
      The artifact.

    Raises:
      InputError: a damaged directory, or a data set of another shape.
    """
    source, manifest = source or EvaluationSource(), checkpoint.read_record(directory)
    if manifest["kind"] == "imported":
        completed, data, arrays = _complete(directory, manifest, source, 0)
        return ModelArtifact(directory, completed, experiment_of(completed), data, held_out=False, given_arrays=arrays)
    if "source" not in manifest:
        _refuse_attack(directory, manifest, source.attack)
        source = EvaluationSource(source.dataset, source.data)
    defense, trigger = manifest.get("defense"), None
    spec = source.dataset or manifest["dataset"]["spec"]
    data = plausibility.aligned(manifest, directory, source.load(spec))
    if source.attack is not None:
        completed, trigger = _measured_with(manifest, spec, data, source, manifest["seed"])
        manifest = {**completed, **{name: manifest[name] for name in ("hash", "dataset")}}
    split = from_json(SplitConfig, manifest["split"], "split") if defense else None
    experiment = experiment_of(manifest, split=split, seed=defense["seed"] if defense else None)
    return ModelArtifact(directory, manifest, experiment, data, held_out=defense is not None, given_arrays=trigger)


def open_together(
    victim: Path, purified: Path, clean: Path | None = None, source: EvaluationSource | None = None
) -> dict[str, ModelArtifact]:
    """Open models that are compared: a victim, what a defense made of it, and a model trained without poison.

    Args:
      victim: directory of a victim, a run or an imported model; for the last, `source.attack` says which trigger.
      purified: directory of the purified model, a run, or another victim.
      clean: directory of the clean model, or None.
      source: the data set and attack.

    Returns:
      {"victim", "purified"} and, if given, "clean".

    Raises:
      InputError: they do not belong together (data set, architecture, shape, classes, victim).
    """
    source = source or EvaluationSource()
    first = open_recorded(checkpoint.model_directory(victim, "victim"), source)
    check_same_dataset(first.manifest, first.data, first.directory)
    if first.manifest["kind"] != "victim" and not first.imported:
        raise InputError(f"{victim} holds a {first.manifest['kind']} model. The victim comes first, then it.")
    if first.imported and source.attack is None:
        raise InputError(f"{victim} was imported. Say by --attack which trigger to look for in it.")
    same_data = EvaluationSource(source.dataset, first.data, source.attack, source.attack_config)
    second = open_recorded(checkpoint.model_directory(purified), same_data)
    _check_alike(first, second)
    origin, recorded = ("source", "source") if first.imported else ("hash", "victim_hash")
    if second.manifest.get(recorded, first.manifest[origin]) != first.manifest[origin]:
        raise InputError(f"{purified} was made of another victim than {victim}. Give the one that it was made of.")
    models = {"victim": first, "purified": second}
    return models if clean is None else {**models, "clean": open_clean(clean, first)}


def open_clean(directory: Path, victim: ModelArtifact) -> ModelArtifact:
    """Open a model trained without poison, to compare `victim` with.

    Raises InputError when it is not one, or not of the victim's architecture and data set.
    """
    clean = open_recorded(checkpoint.model_directory(directory, "victim"), EvaluationSource(data=victim.data))
    _check_alike(victim, clean)
    check_clean(clean)
    return clean


def check_clean(artifact: ModelArtifact) -> None:
    """Check that a model was trained without poison. Raises InputError when it was not."""
    kind, attack = artifact.manifest["kind"], artifact.experiment.attack
    if (kind, attack) != ("victim", "clean"):
        raise InputError(
            f"{artifact.directory} holds no clean model but a {kind} one ({attack}). "
            "Train one with `bdjax train clean`."
        )


def trigger_arrays(attack: str, config: Any, data: Data, seed: int) -> Arrays:
    """Make the arrays that a trigger needs from its config and the data alone.

    Args:
      attack: its name.
      config: its Config.
      data: the training set.
      seed: of the victim; `prepare` gets the same key as in its training.

    Returns:
      The arrays; empty for a trigger that needs none.

    Raises:
      NeedsTraining: the trigger is learned with its victim.
      InputError: the attack has no trigger.
    """
    spec = registry.load("attacks", attack)
    if spec.trigger is None:
        raise InputError(f"{attack} attacks a purified model and has no trigger.")
    if spec.prepare is None:
        if spec.needs_arrays:
            raise NeedsTraining
        return {}

    def needs_training(*_: Any, **__: Any) -> Any:
        raise NeedsTraining

    model = Model("untrained", data.shape, len(data.classes), init=needs_training, apply=needs_training)
    task = Task(data.x_train, data.y_train, model, read_array)
    return spec.prepare(config, task, attacks.keys_of(stage_key(seed, "attack")).prepare)


def _complete(
    directory: Path, manifest: Mapping[str, Any], source: EvaluationSource, seed: int
) -> tuple[dict[str, Any], Data, Arrays]:
    """The manifest of an imported model with the attack and data set it is measured with, the data, the trigger."""
    if source.dataset is None:
        raise InputError(f"{directory} was imported and has no data set of its own. Give one by --dataset.")
    data = plausibility.aligned(manifest, directory, source.load())
    check_fits(manifest, directory, data)
    completed, arrays = _measured_with(manifest, source.dataset, data, source, seed)
    return completed, data, arrays


def _measured_with(
    manifest: Mapping[str, Any], spec: str, data: Data, source: EvaluationSource, seed: int
) -> tuple[dict[str, Any], Arrays]:
    """A manifest with an attack and a data set, as if the model had been trained on them here; and the trigger.

    Raises InputError for an attack whose trigger is learned, and for one that does not fit the classes.
    """
    experiment = Experiment(source.attack or "clean", None, spec, manifest["model"], seed, source.attack_config)
    if registry.load("attacks", experiment.attack).trigger is not None:  # else trigger_arrays refuses it
        check_target(experiment.attack_config, len(data.classes))
    try:
        arrays = trigger_arrays(experiment.attack, experiment.attack_config, data, seed)
    except NeedsTraining:
        raise InputError(
            f"the trigger of {source.attack} is learned with its victim, so it cannot be put on images for another "
            "model. Give its picture to image_trigger: --attack image_trigger --attack.trigger FILE."
        ) from None
    record = {"imported": manifest["hash"], **attack_record(experiment, data.fingerprint)}
    named = {"classes": plausibility.class_names(manifest, data)}
    completed = {**manifest, **training_record(experiment, data), **named, "fit": None, "hash": digest(record)}
    return completed, {**arrays, **trigger_previews(experiment, data, arrays)}


def _refuse_attack(directory: Path, manifest: Mapping[str, Any], attack: str | None) -> None:
    """Refuse another attack than the recorded one; the user's own file may be named, to say that it may be run."""
    if attack is not None and not registry.same_file(attack, manifest["attack"]["name"]):
        raise InputError(
            f"{directory} records its own attack ({manifest['attack']['name']}). --attack is for imported models."
        )


_COMPARED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "model": lambda m: m["model"],
    "image shape": lambda m: "x".join(map(str, m["shape"])),
    "number of classes": lambda m: len(m["classes"]),
    "data set (its fingerprint)": lambda m: f"{m['dataset']['name']} {m['dataset']['fingerprint'][:12]}",
}


def _check_alike(victim: ModelArtifact, other: ModelArtifact) -> None:
    for quantity, value_in in _COMPARED.items():
        if (expected := value_in(victim.manifest)) != (actual := value_in(other.manifest)):
            raise InputError(
                f"{victim.directory} and {other.directory} differ in their {quantity}: {expected} and {actual}. "
                "Only models of one kind and one data set can be compared."
            )
