"""A model directory read again as a suspect: the model, what it is measured on, and what a defender sees of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bdjax import checkpoint, datasets
from bdjax.errors import InputError
from bdjax.evaluation import Evaluation
from bdjax.experiment import Experiment, SplitConfig, from_json
from bdjax.types import Data, DefenderView, Victim, Watch
from bdjax.victim import check_fingerprint, experiment_of, load_model


@dataclass(frozen=True)
class Suspect:
    """What a model directory records, and its data set. The model and its test images are read when first used."""

    directory: Path
    manifest: dict[str, Any]
    experiment: Experiment
    data: Data
    held_out: bool = True
    """Leave the defender's images out of the test set."""

    @cached_property
    def victim(self) -> Victim:
        """The model. Raises InputError when the data set is of another shape or class count."""
        return Victim(*load_model(self.manifest, self.directory, self.data))

    @cached_property
    def evaluation(self) -> Evaluation:
        """Held-out images, clean and with the model's own trigger. Raises InputError when that is not stored."""
        if not (self.directory / "trigger.npz").is_file():
            raise InputError(f"{self.directory} holds no trigger: trigger.npz is missing. Train the victim anew.")
        return Evaluation(
            self.victim.model,
            self.data,
            self.experiment,
            checkpoint.read_arrays(self.directory, "trigger"),
            self.held_out,
        )

    def view(self, watch: Watch | None = None, trigger: bool = False) -> DefenderView:
        """The defender's clean images; `watch` is shown the defense at work; `trigger`: with the true trigger."""
        found = self.evaluation
        return DefenderView(
            found.clean_images, found.clean_labels, watch or Watch(), found.trigger if trigger else None
        )


def read_suspect(
    directory: Path,
    defense: str,
    defense_config: Any,
    *,
    split: SplitConfig | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    data: Data | None = None,
) -> Suspect:
    """The suspect in `directory`, on the data set that it was trained on.

    Args:
      split: the defender's images; seed: of the defense, default the victim's.
      dataset: where the data set lies now, when it has moved; data: the set itself, when it is loaded already.

    Raises InputError for a damaged directory and for another data set.
    """
    manifest = checkpoint.read_manifest(directory)
    experiment = experiment_of(manifest, defense, defense_config, split, seed)
    data = data or datasets.load(dataset or experiment.dataset)
    check_fingerprint(manifest, data, directory)
    return Suspect(directory, manifest, experiment, data)


def read_recorded(directory: Path, *, dataset: str | None = None, data: Data | None = None) -> Suspect:
    """A victim or purified directory as it was recorded: the defender's images of a purified model are left out.

    Args: dataset: where the data set lies; data: the set itself, when it is loaded already. Any set of the model's
    shape will do: whether it is the recorded one (`check_fingerprint`) is for the caller to ask.
    """
    manifest = checkpoint.read_manifest(directory)
    defense = manifest.get("defense")
    split = from_json(SplitConfig, manifest["split"]) if defense else None
    experiment = experiment_of(manifest, None, None, split, defense["seed"] if defense else None)
    data = data or datasets.load(dataset or experiment.dataset)
    return Suspect(directory, manifest, experiment, data, held_out=defense is not None)


def read_together(
    victim: Path, purified: Path, clean: Path | None = None, dataset: str | None = None
) -> dict[str, Suspect]:
    """{"victim", "purified", "clean"} (the last if it is given): models to compare, each the one in a run, too.

    In place of the purified model another victim will do. Raises InputError when they do not belong together: another
    data set, architecture, shape or number of classes, a purified model of another victim, a poisoned clean model.
    """
    first = read_recorded(checkpoint.model_directory(victim, "victim"), dataset=dataset)
    check_fingerprint(first.manifest, first.data, first.directory)
    if first.manifest["kind"] != "victim":
        raise InputError(f"{victim} holds a {first.manifest['kind']} model. The victim comes first, then it.")
    second = read_recorded(checkpoint.model_directory(purified), data=first.data)
    _check_alike(first, second)
    if second.manifest.get("victim_hash", first.manifest["hash"]) != first.manifest["hash"]:
        raise InputError(f"{purified} was made of another victim than {victim}. Give the one that it was made of.")
    if clean is None:
        return {"victim": first, "purified": second}
    return {"victim": first, "purified": second, "clean": read_clean(clean, first)}


def read_clean(directory: Path, victim: Suspect) -> Suspect:
    """A model trained without poison, to compare `victim` with. Raises InputError when it is not one, or not alike."""
    found = read_recorded(checkpoint.model_directory(directory, "victim"), data=victim.data)
    _check_alike(victim, found)
    if (found.manifest["kind"], found.experiment.attack) != ("victim", "clean"):
        raise InputError(
            f"{directory} holds no clean model but a {found.manifest['kind']} one ({found.experiment.attack}). "
            "Train one with `bdjax train clean`."
        )
    return found


def _check_alike(victim: Suspect, other: Suspect) -> None:
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
