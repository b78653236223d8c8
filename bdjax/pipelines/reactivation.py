"""Re-activation attacks on a purified model: can its backdoor be brought back?"""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bdjax import attacks, registry
from bdjax.config import Experiment, stage_key, to_json
from bdjax.engine import parallel
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import ModelArtifact, check_same_dataset
from bdjax.pipelines.context import Context
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.opening import EvaluationSource, check_clean, open_recorded
from bdjax.pipelines.results import Rates, ReactivationResult, write_json
from bdjax.pipelines.training import task_of
from bdjax.protocols import AttackSpec
from bdjax.types import Backdoor, Key, ReactivationInputs, Variables


@dataclass(frozen=True)
class ReactivationRequest:
    """A re-activation attack on the model in a directory."""

    directory: Path
    """Of a purified model or a run; or of a victim, as a control."""
    attack: str
    """Name of an attack with `reactivate`."""
    config: Any = None
    """The attack's Config; None: the defaults."""
    seed: int = 0
    """Of the attack."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """Configs of the re-activation attacks that this one starts with, by name; default their defaults."""
    clean_model: Path | None = None
    """Directory of a model trained without poison; None: one is found in, or trained into, the context's store."""
    attack_clean_model: bool = True
    """Also attack that clean model, for comparison (it does not depend on the defense)."""
    dataset: str | None = None
    """Where the data set lies now, if it has moved."""


@dataclass(frozen=True)
class _Attacker:
    """The attack resolved: specs and Configs by name, the model, the clean variables and how it is carried out."""

    specs: Mapping[str, AttackSpec]
    configs: Mapping[str, Any]
    artifact: ModelArtifact
    clean: Variables
    context: Context
    recorder: Recorder
    clock: Clock
    key: Key

    @property
    def experiment(self) -> Experiment:
        """The experiment with the seed that the victim was trained with, not the defense's."""
        return _training_experiment(self.artifact)

    def attack(self, attack: str, variables: Variables, name: str) -> Backdoor:
        """Attack one model, after the attacks that `attack` needs.

        Args:
          attack: name of the re-activation attack.
          variables: of the model.
          name: of the model, for the directory of unfinished epochs.

        Returns:
          The re-activated model.
        """
        spec, config, experiment = self.specs[attack], self.configs[attack], self.experiment
        if spec.reactivate is None:
            raise InputError(f"{attack} is no re-activation attack.")
        earlier = {needed: self.attack(needed, variables, name).variables for needed in spec.needs}
        directory = self.artifact.directory
        unfinished = directory.with_name(f".{directory.name}.{attack}-{name}")
        task = task_of(experiment, self.artifact.data, self.context, self.recorder, unfinished, self.clock)
        arrays = attacks.without_previews(checkpoint.read_arrays(directory, "trigger"))
        keys = jax.random.fold_in(self.key, 0), stage_key(experiment.seed, "attack")
        payload = attacks.payload(
            experiment.attack, experiment.attack_config, task, keys, arrays, config.count,
            config.payload == "triggered",
        )  # fmt: skip
        backdoor = Backdoor(experiment.attack, experiment.attack_config, variables, arrays)
        inputs = ReactivationInputs(variables, earlier, self.clean, payload)
        reactivated = spec.reactivate(config, inputs, backdoor, task, jax.random.fold_in(self.key, 1))
        shutil.rmtree(unfinished, ignore_errors=True)
        return reactivated


def reactivate(
    request: ReactivationRequest, out: Path | None = None, context: Context | None = None
) -> ReactivationResult:
    """Run a re-activation attack on a purified model and, for comparison, on a clean one.

    Args:
      request: model, attack, seed.
      out: gets result.json and model/, the re-activated variables with the attack's arrays; None: nothing is written.
      context: devices, progress, and the store of clean models.

    Returns:
      The rates before and after; the ASR after it is R-ASR or Q-ASR.

    Raises:
      InputError: a model without a trigger, an attack of another kind, or a clean model that does not fit.
    """
    context, attack = context or Context(), request.attack
    specs = _load_specs(attack)
    configs = {name: spec.Config() for name, spec in specs.items()} | dict(request.earlier)
    configs[attack] = request.config if request.config is not None else specs[attack].Config()
    artifact = _open(request.directory, request.dataset)
    if not (artifact.directory / "trigger.npz").exists():
        raise InputError(f"{artifact.directory} has no trigger: there is nothing to re-activate, or to measure it by.")
    if out is not None and (Path(out) / "result.json").exists():
        raise InputError(f"{out} holds a result already. Choose another --out, or use --force.")
    clock, recorder = Clock(), Recorder(context.tick)
    with parallel.using(context.devices):
        clean = _clean_variables(artifact, request, context)
        key = jax.random.fold_in(stage_key(request.seed, "attack"), 7)
        attacker = _Attacker(specs, configs, artifact, clean, context, recorder, clock, key)
        attacked = {"purified": artifact.victim.variables}
        if request.attack_clean_model:
            attacked["clean"] = clean
        before = {name: artifact.evaluation.measure(variables) for name, variables in attacked.items()}
        backdoors = {name: attacker.attack(attack, variables, name) for name, variables in attacked.items()}
        after = {
            name: _measure(specs[attack], configs[attack], artifact.evaluation, backdoor)
            for name, backdoor in backdoors.items()
        }
    result = _result(request, attacker, before, after)
    if out is not None:
        _write(Path(out), result, artifact, backdoors["purified"])
    return result


def _result(
    request: ReactivationRequest, attacker: _Attacker, before: Mapping[str, Rates], after: Mapping[str, Rates]
) -> ReactivationResult:
    artifact, attack = attacker.artifact, request.attack
    seconds, compiling = attacker.clock.read()
    return {
        "kind": "reactivation",
        "reactivation": attack,
        "metric": attacker.specs[attack].metric,
        "directory": str(artifact.directory),
        "model": artifact.manifest["model"],
        "hash": artifact.manifest["hash"],
        "attack": artifact.experiment.attack,
        "defense": artifact.manifest.get("defense"),
        "dataset": artifact.data.name,
        "seed": request.seed,
        "n_test": len(artifact.evaluation.images),
        "n_asr": int(artifact.evaluation.eligible.sum()),
        "before": before["purified"],
        "after": after["purified"],
        "clean_before": before.get("clean"),
        "clean_after": after.get("clean"),
        "config": to_json(attacker.configs[attack]),
        "earlier": {name: to_json(config) for name, config in attacker.configs.items() if name != attack},
        "seconds": {"attack": seconds, "compile": compiling},
        "env": environment(attacker.context.devices),
    }


def _open(directory: Path, dataset: str | None) -> ModelArtifact:
    artifact = open_recorded(checkpoint.model_directory(directory), EvaluationSource(dataset))
    check_same_dataset(artifact.manifest, artifact.data, artifact.directory)
    if artifact.manifest.get("source"):
        raise InputError(f"{directory} goes back to an imported model, and how that was trained is not known.")
    return artifact


def _load_specs(attack: str) -> dict[str, AttackSpec]:
    """The attack and those that come before it, by name. Raises InputError when it re-activates nothing."""
    spec = registry.load("attacks", attack)
    if spec.reactivate is None:
        able = [name for name in registry.names("attacks") if registry.load("attacks", name).reactivate is not None]
        raise InputError(f"{attack} is no re-activation attack. Choose from {', '.join(able)}.")
    specs = {attack: spec}
    for needed in spec.needs:
        specs |= _load_specs(needed)
    return specs


def _clean_variables(artifact: ModelArtifact, request: ReactivationRequest, context: Context) -> Variables:
    """Variables of the clean model, of the artifact's architecture and data set."""
    directory = request.clean_model
    if directory is None:
        unfinished = artifact.directory.with_name(f".{artifact.directory.name}.clean-model")
        experiment, recorder = _training_experiment(artifact), Recorder(context.tick)
        return task_of(experiment, artifact.data, context, recorder, unfinished, Clock()).clean()
    other = _open(directory, request.dataset)
    if request.attack_clean_model:
        check_clean(other)
    for quantity in ("model", "shape", "classes"):
        if other.manifest[quantity] != artifact.manifest[quantity]:
            raise InputError(
                f"{directory} is not comparable: its {quantity} is {other.manifest[quantity]}, that of "
                f"{artifact.directory} is {artifact.manifest[quantity]}. Train one alike with `bdjax train clean`."
            )
    return other.victim.variables


def _training_experiment(artifact: ModelArtifact) -> Experiment:
    return dataclasses.replace(artifact.experiment, seed=artifact.manifest["seed"])


def _measure(spec: AttackSpec, config: Any, evaluation: Evaluation, backdoor: Backdoor) -> Rates:
    perturb = spec.perturb
    if perturb is None:
        return evaluation.measure(backdoor.variables)
    arrays = jax.tree.map(jnp.asarray, dict(backdoor.arrays))
    return evaluation.measure(backdoor.variables, lambda images: perturb(config, images, arrays))


def _write(out: Path, result: ReactivationResult, artifact: ModelArtifact, backdoor: Backdoor) -> None:
    out.mkdir(parents=True, exist_ok=True)
    manifest = {k: v for k, v in artifact.manifest.items() if k not in ("files", "format")}
    reactivation = {"name": result["reactivation"], "config": result["config"], "seed": result["seed"]}
    checkpoint.write_model(
        out / "model",
        {**manifest, "kind": "reactivated", "reactivation": reactivation},
        backdoor.variables,
        {"trigger": checkpoint.read_arrays(artifact.directory, "trigger"), "reactivation": backdoor.arrays},
    )
    write_json(out / "result.json", result)
