"""A model directory read again as a suspect: the model, what it is measured on, and what a defender sees of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bdjax import checkpoint, datasets
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
        """Held-out images, clean and with the model's own trigger."""
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


def read_model(directory: Path, dataset: str | None = None, moved: str | None = None) -> Suspect:
    """A victim, purified or retuned directory (or a run's, which holds purified/) as it was measured.

    Args:
      dataset: another data set of the model's shape, all of whose test images count.
      moved: where the model's own data set lies now.

    Raises InputError for a damaged directory and, unless `dataset` is given, for another data set than the model's.
    """
    directory = Path(directory)
    if not (directory / checkpoint.MANIFEST).exists() and (directory / "purified").is_dir():
        directory = directory / "purified"
    manifest = checkpoint.read_manifest(directory)
    data = datasets.load(dataset or moved or manifest["dataset"]["spec"])
    defense = manifest.get("defense")
    split = from_json(SplitConfig, manifest["split"]) if defense else None
    experiment = experiment_of(manifest, None, None, split, defense["seed"] if defense else None)
    if dataset is None:
        check_fingerprint(manifest, data, directory)
    return Suspect(directory, manifest, experiment, data, held_out=defense is not None and dataset is None)
