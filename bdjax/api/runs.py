"""Load data sets and models, train victims and defend them."""

from pathlib import Path
from typing import Any

from bdjax import datasets, interop, registry
from bdjax.api._common import directory_of, make_config, run_context
from bdjax.api.objects import Model, Run
from bdjax.config import Experiment, FitConfig, SplitConfig, digest
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import defend as defending
from bdjax.pipelines import run as running
from bdjax.pipelines import training
from bdjax.pipelines.environment import environment
from bdjax.pipelines.opening import EvaluationSource
from bdjax.types import Data


def load_dataset(spec: str) -> Data:
    """Load a data set: "digits", "npz:PATH", "folder:PATH", "tfds:NAME", or "FILE.py:REST" for a user's own."""
    return datasets.load(spec)


def load_model(path: str | Path, model: str | None = None, root: str | Path = "runs", **options: Any) -> Model:
    """Load a model: a directory of bdjax, or a PyTorch or safetensors file, which is read without running any code.

    Args:
      path: a model directory, a run's directory (then its cleaned model), or a weight file.
      model: of a file: name of the network; None: what the file says.
      root: a file is imported into root/models/HASH.
      **options: of a file: further arguments of :func:`bdjax.interop.import_model`, such as `classes` or `input`.

    Returns:
      The model.

    Raises:
      InputError: the file cannot be read as this network, or there is nothing at the path.
    """
    path = Path(path)
    if path.is_dir():
        return Model(checkpoint.model_directory(path))
    if not path.exists():
        raise InputError(f"{path} does not exist. Give a weight file, or a model directory of bdjax.")
    plain = {name: interop.option_to_json(value) for name, value in options.items()}
    directory = Path(root) / "models" / digest([checkpoint.sha256(path), model, plain])[:16]
    if not directory.exists():
        interop.import_model(path, directory, model=model, env=environment(), **options)
    return Model(directory)


def train(
    attack: str = "clean",
    dataset: str = "digits",
    model: str = "cnn",
    *,
    seed: int = 0,
    attack_config: Any = None,
    fit: Any = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    devices: int = 0,
) -> Model:
    """Train a model with a backdoor, or without one by the attack "clean".

    Args:
      attack: name of the attack, or the path of a user's .py file.
      dataset: as for :func:`load_dataset`.
      model: name of the network.
      seed: everything random follows from it.
      attack_config: the attack's Config or its fields; None: the defaults.
      fit: :class:`bdjax.config.FitConfig` or its fields; None: the defaults.
      out: directory of the victim; None: root/victims/HASH.
      root: directory of all results.
      devices: local devices to use, 0 for all.

    Returns:
      The victim.

    Raises:
      InputError: for what does not fit.
    """
    config = make_config(registry.load("attacks", attack).Config, attack_config)
    experiment = Experiment(attack, None, dataset, model, seed, config, fit=make_config(FitConfig, fit))
    data, store = datasets.load(dataset), Path(root) / "victims"
    resolved = training.resolve_training(experiment, data, Path(out) if out else None, store)
    with run_context(devices, store=None if out else store) as context:
        return Model(training.train_resolved(resolved, context))


def defend(
    victim: Model | str | Path,
    defense: str = "ibau",
    *,
    config: Any = None,
    split: Any = None,
    seed: int | None = None,
    source: EvaluationSource | None = None,
    clean_model: Model | str | Path | None = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    devices: int = 0,
    estimate: bool = True,
) -> Run:
    """Remove the backdoor from a model and measure before and after.

    Args:
      victim: the model or its directory.
      defense: name of the defense, or the path of a user's .py file.
      config: the defense's Config or its fields; None: the defaults.
      split: :class:`bdjax.config.SplitConfig` or its fields: the defender's clean images.
      seed: of the defense; None: the victim's.
      source: data set and attack that an imported model is measured with.
      clean_model: a model trained alike without poison, for AGE's score.
      out: directory of the run; None: root/HASH.
      root: directory of all results.
      devices: local devices to use, 0 for all.
      estimate: also estimate the attack success rate without the trigger.

    Returns:
      The run.

    Raises:
      InputError: for what does not fit.
    """
    request = defending.DefenseRequest(
        directory_of(victim),
        defense,
        make_config(registry.load("defenses", defense).Config, config),
        make_config(SplitConfig, split),
        seed,
        source or EvaluationSource(),
        None if clean_model is None else directory_of(clean_model),
    )
    with run_context(devices, estimate) as context:
        resolved = defending.resolve_defense(request)
        directory = Path(out) if out else resolved.directory_in(Path(root))
        return Run(directory, defending.defend_resolved(resolved, directory, context))


def run(
    attack: str,
    defense: str,
    dataset: str = "digits",
    model: str = "cnn",
    *,
    seed: int = 0,
    attack_config: Any = None,
    defense_config: Any = None,
    fit: Any = None,
    split: Any = None,
    with_clean_model: bool = False,
    root: str | Path = "runs",
    devices: int = 0,
) -> Run:
    """Train a victim and defend it: :func:`train` and :func:`defend` in one call.

    Args:
      attack: name of the attack.
      defense: name of the defense.
      dataset: as for :func:`load_dataset`.
      model: name of the network.
      seed: everything random follows from it.
      attack_config: the attack's Config or its fields.
      defense_config: the defense's Config or its fields.
      fit: :class:`bdjax.config.FitConfig` or its fields.
      split: :class:`bdjax.config.SplitConfig` or its fields.
      with_clean_model: also train the model without poison, for AGE's score.
      root: directory of all results.
      devices: local devices to use, 0 for all.

    Returns:
      The run.

    Raises:
      InputError: for what does not fit.
    """
    experiment = Experiment(
        attack, defense, dataset, model, seed,
        make_config(registry.load("attacks", attack).Config, attack_config),
        make_config(registry.load("defenses", defense).Config, defense_config),
        make_config(FitConfig, fit), make_config(SplitConfig, split),
    )  # fmt: skip
    with run_context(devices, True) as context:
        result, directory = running.run(running.RunRequest(experiment, Path(root), None, with_clean_model), context)
        return Run(directory, result)
