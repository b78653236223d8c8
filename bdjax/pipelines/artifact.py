"""A model directory read again as a suspect: the model, what it is measured on, and what a defender sees of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bdjax import attacks, datasets, registry
from bdjax.config import Experiment, SplitConfig, attack_record, digest, from_json, stage_key
from bdjax.datasets._files import read_array
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import plausibility
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.victim import check_fingerprint, check_fits, describe, experiment_of, load_model, trigger_previews
from bdjax.types import Arrays, Callback, Data, DefenderView, Model, NeedsTraining, Task, Victim


@dataclass(frozen=True)
class ModelArtifact:
    """What a model directory records, and its data set. The model and its test images are read when first used."""

    directory: Path
    manifest: dict[str, Any]
    experiment: Experiment
    data: Data
    held_out: bool = True
    """Leave the defender's images out of the test set."""
    given: Arrays | None = None
    """Arrays of the trigger that an imported model is measured with; None: those in the directory."""

    @cached_property
    def trigger_arrays(self) -> Arrays:
        """What is stored of the model's own trigger. Raises InputError when that is not there."""
        if self.given is not None:
            return self.given
        if not (self.directory / "trigger.npz").is_file():
            raise InputError(f"{self.directory} holds no trigger: trigger.npz is missing. Train the victim anew.")
        return checkpoint.read_arrays(self.directory, "trigger")

    @cached_property
    def victim(self) -> Victim:
        """The model. Raises InputError when the data set is of another shape or class count."""
        return Victim(*load_model(self.manifest, self.directory, self.data))

    @cached_property
    def evaluation(self) -> Evaluation:
        """Held-out images, clean and with the model's own trigger. Raises InputError when that is not stored."""
        return Evaluation(self.victim.model, self.data, self.experiment, dict(self.trigger_arrays), self.held_out)

    def view(self, callback: Callback | None = None, trigger: bool = False) -> DefenderView:
        """The defender's clean images; `watch` is shown the defense at work; `trigger`: with the true trigger."""
        found = self.evaluation
        return DefenderView(
            found.clean_images, found.clean_labels, callback or Callback(), found.trigger if trigger else None
        )


def open_artifact(
    directory: Path,
    defense: str,
    defense_config: Any,
    *,
    split: SplitConfig | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    data: Data | None = None,
    attack: str | None = None,
    attack_config: Any = None,
) -> ModelArtifact:
    """The suspect in `directory`, on the data set that it was trained on.

    Args:
      split: the defender's images; seed: of the defense, default the victim's.
      dataset: where the data set lies now, when it has moved; data: the set itself, when it is loaded already.
      attack, attack_config: what an imported model, which has none of its own, is measured with; it needs `dataset`.

    Raises InputError for a damaged directory and for another data set.
    """
    manifest = checkpoint.read_record(directory)
    if manifest["kind"] == "imported":
        return _imported(
            directory, manifest, defense, defense_config, split, seed, dataset, data, attack, attack_config
        )
    _refuse_attack(directory, manifest, attack)
    experiment = experiment_of(manifest, defense, defense_config, split, seed)
    data = plausibility.aligned(manifest, directory, data or datasets.load(dataset or experiment.dataset))
    check_fingerprint(manifest, data, directory)
    return ModelArtifact(directory, manifest, experiment, data)


def _imported(
    directory: Path, manifest: dict[str, Any], defense: str | None, defense_config: Any, split: SplitConfig | None,
    seed: int | None, dataset: str | None, data: Data | None, attack: str | None, attack_config: Any,
) -> ModelArtifact:  # fmt: skip
    """An imported model on a data set, with the trigger of an attack; without one, images are left as they are."""
    if dataset is None:
        raise InputError(f"{directory} was imported and has no data set of its own. Give one by --data or --dataset.")
    data = plausibility.aligned(manifest, directory, data or datasets.load(dataset))
    check_fits(manifest, directory, data)
    whole, arrays = _adopted(manifest, dataset, data, attack, attack_config, seed or 0)
    experiment = experiment_of(whole, defense, defense_config, split, seed)
    return ModelArtifact(directory, whole, experiment, data, held_out=defense is not None, given=arrays)


def _adopted(
    manifest: dict[str, Any], spec: str, data: Data, attack: str | None, config: Any, seed: int
) -> tuple[dict[str, Any], Arrays]:
    """The manifest of an imported model with an attack and a data set, as if it had been planted here; and its arrays.

    Args: spec: of `data`; attack: what is measured, with its Config (None: the defaults); None: nothing but accuracy.
    Raises InputError for an attack whose trigger is learned, and for one that does not fit the classes.
    """
    experiment = Experiment(attack or "clean", None, spec, manifest["model"], seed, config)
    if hasattr(registry.load("attacks", experiment.attack), "trigger"):  # else it is refused below
        attacks.check_target(experiment.attack_config, len(data.classes))
    try:
        arrays = trigger_arrays(experiment.attack, experiment.attack_config, data, seed)
    except NeedsTraining:
        raise InputError(
            f"the trigger of {attack} is learned with its victim, so it cannot be put on images for another model. "
            "Give its picture to image_trigger: --attack image_trigger --attack.trigger FILE."
        ) from None
    record = {"imported": manifest["hash"], **attack_record(experiment, data.fingerprint)}
    named = {"classes": plausibility.class_names(manifest, data)}
    whole = {**manifest, **describe(experiment, data), **named, "fit": None, "hash": digest(record)}
    return whole, {**arrays, **trigger_previews(experiment, data, arrays)}


def trigger_arrays(attack: str, config: Any, data: Data, seed: int) -> Arrays:
    """What `prepare` makes for this data, with the key that `attacks.plant` gives it.

    Raises NeedsTraining when the trigger takes more than that, InputError when the attack has none.
    """
    module = registry.load("attacks", attack)
    if not hasattr(module, "trigger"):
        raise InputError(f"{attack} attacks a purified model and has no trigger.")
    if not hasattr(module, "prepare"):
        learned = any(hasattr(module, name) for name in ("train", "edit"))
        if learned and getattr(module, "NEEDS_ARRAYS", False):
            raise NeedsTraining
        return {}

    def needs_training(*_: Any, **__: Any) -> Any:
        raise NeedsTraining

    model = Model("untrained", data.shape, len(data.classes), init=needs_training, apply=needs_training)
    task = Task(data.x_train, data.y_train, model, read_array)
    return module.prepare(config, task, attacks.keys_of(stage_key(seed, "attack")).prepare)


def _refuse_attack(directory: Path, manifest: dict[str, Any], attack: str | None) -> None:
    """Refuse an attack beside the recorded one; its own file, named to say that it may be run, is no other."""
    if attack is not None and not registry.same_file(attack, manifest["attack"]["name"]):
        raise InputError(
            f"{directory} records its own attack ({manifest['attack']['name']}). --attack is for imported models."
        )


def read_recorded(
    directory: Path,
    *,
    dataset: str | None = None,
    data: Data | None = None,
    attack: str | None = None,
    attack_config: Any = None,
) -> ModelArtifact:
    """A victim or purified directory as it was recorded: the defender's images of a purified model are left out.

    Args: dataset: where the data set lies; data: the set itself, when it is loaded already. Any set of the model's
    shape will do: whether it is the recorded one (`check_fingerprint`) is for the caller to ask. attack,
    attack_config: as for :func:`open_artifact`; taken by what a defense made of an imported model, too.
    """
    manifest = checkpoint.read_record(directory)
    if manifest["kind"] == "imported":
        return _imported(directory, manifest, None, None, None, None, dataset, data, attack, attack_config)
    if "source" not in manifest:
        _refuse_attack(directory, manifest, attack)
        attack = None
    defense, arrays = manifest.get("defense"), None
    spec = dataset or manifest["dataset"]["spec"]
    data = plausibility.aligned(manifest, directory, data or datasets.load(spec))
    if attack is not None:
        whole, arrays = _adopted(manifest, spec, data, attack, attack_config, manifest["seed"])
        manifest = {**whole, **{name: manifest[name] for name in ("hash", "dataset")}}
    split = from_json(SplitConfig, manifest["split"], "split") if defense else None
    experiment = experiment_of(manifest, None, None, split, defense["seed"] if defense else None)
    return ModelArtifact(directory, manifest, experiment, data, held_out=defense is not None, given=arrays)


def read_together(
    victim: Path, purified: Path, clean: Path | None = None, dataset: str | None = None, attack: str | None = None,
    attack_config: Any = None,
) -> dict[str, ModelArtifact]:  # fmt: skip
    """{"victim", "purified", "clean"} (the last if it is given): models to compare, each the one in a run, too.

    In place of the purified model another victim will do. The victim may be an imported model: `attack` and its Config
    then say which trigger to look for, on `dataset`. Raises InputError when they do not belong together: another
    data set, architecture, shape or number of classes, a purified model of another victim, a poisoned clean model.
    """
    given = {"attack": attack, "attack_config": attack_config}
    first = read_recorded(checkpoint.model_directory(victim, "victim"), dataset=dataset, **given)
    check_fingerprint(first.manifest, first.data, first.directory)
    imported = first.manifest["kind"] == "imported"
    if first.manifest["kind"] != "victim" and not imported:
        raise InputError(f"{victim} holds a {first.manifest['kind']} model. The victim comes first, then it.")
    if imported and attack is None:
        raise InputError(f"{victim} was imported. Say by --attack which trigger to look for in it.")
    second = read_recorded(checkpoint.model_directory(purified), dataset=dataset, data=first.data, **given)
    _check_alike(first, second)
    origin = "source" if imported else "hash"
    if second.manifest.get("source" if imported else "victim_hash", first.manifest[origin]) != first.manifest[origin]:
        raise InputError(f"{purified} was made of another victim than {victim}. Give the one that it was made of.")
    if clean is None:
        return {"victim": first, "purified": second}
    return {"victim": first, "purified": second, "clean": read_clean(clean, first)}


def read_clean(directory: Path, victim: ModelArtifact) -> ModelArtifact:
    """A model trained without poison, to compare `victim` with. Raises InputError when it is not one, or not alike."""
    found = read_recorded(checkpoint.model_directory(directory, "victim"), data=victim.data)
    _check_alike(victim, found)
    if (found.manifest["kind"], found.experiment.attack) != ("victim", "clean"):
        raise InputError(
            f"{directory} holds no clean model but a {found.manifest['kind']} one ({found.experiment.attack}). "
            "Train one with `bdjax train clean`."
        )
    return found


def _check_alike(victim: ModelArtifact, other: ModelArtifact) -> None:
    for what, of in (
        ("model", lambda m: m["model"]),
        ("image shape", lambda m: "x".join(map(str, m["shape"]))),
        ("number of classes", lambda m: len(m["classes"])),
        ("data set (its fingerprint)", lambda m: f"{m['dataset']['name']} {m['dataset']['fingerprint'][:12]}"),
    ):
        if (one := of(victim.manifest)) != (two := of(other.manifest)):
            raise InputError(
                f"{victim.directory} and {other.directory} differ in their {what}: {one} and {two}. "
                "Only models of one kind and one data set can be compared."
            )
