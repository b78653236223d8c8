"""Attack a purified model again: is the backdoor gone, or only asleep?"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bdjax import attacks, registry
from bdjax.config import stage_key, to_json
from bdjax.engine import parallel
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import ModelArtifact, read_recorded
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.victim import Context, check_fingerprint, task_of
from bdjax.types import Backdoor, Key, ReactivationInputs, Variables


def reactivate(
    directory: Path,
    attack: str,
    config: Any = None,
    out: Path | None = None,
    *,
    seed: int = 0,
    earlier: Mapping[str, Any] | None = None,
    clean: Path | None = None,
    control: bool = True,
    dataset: str | None = None,
    context: Context | None = None,
) -> dict[str, Any]:
    """Let a re-activation attack loose on the model in `directory`, and on a clean model beside it.

    Args:
      directory: purified (or a run's, or a victim's, as a control). attack: a module with `reactivate`.
      config: the attack's; None: its defaults. seed: of the attack.
      earlier: Configs of the re-activations that this one begins with, by name; default their defaults.
      out: gets result.json and model/, the re-activated variables with the attack's arrays; None: nothing is written.
      clean: directory of `bdjax train clean`; None: a clean model is found in, or trained into, context.store.
      control: attack that clean model too, for the line to compare with (it does not depend on the defense).
      dataset: where the data set lies now, if it has moved.

    Returns: JSON-able: "before" and "after" (ACC and ASR of the purified model, and of the re-activated one, which is
      R-ASR or Q-ASR), "clean_before" and "clean_after" the same of the clean model (None without `control`).
    Raises InputError for a model without a trigger, an attack of another kind, and clean models that do not fit.
    """
    module, context = _module(attack), context or Context()
    config = config or module.Config()
    configs = {name: _module(name).Config() for name in getattr(module, "NEEDS", ())} | dict(earlier or {})
    artifact = _read(directory, dataset)
    if not (artifact.directory / "trigger.npz").exists():
        raise InputError(f"{artifact.directory} has no trigger: there is nothing to re-activate, or to measure it by.")
    if out is not None and (Path(out) / "result.json").exists():
        raise InputError(f"{out} holds a result already. Choose another --out, or use --force.")
    clock, callback = Clock(), Recorder(context.tick)
    with parallel.using(context.devices):
        reference = _clean(artifact, clean, context, dataset)
        key = jax.random.fold_in(stage_key(seed, "attack"), 7)
        attacked = {"purified": artifact.victim.variables} | ({"clean": reference} if control else {})
        before = {name: artifact.evaluation.measure(variables) for name, variables in attacked.items()}
        planted = {
            name: _again(
                artifact, attack, {**configs, attack: config}, variables, reference, name, context, callback, clock, key
            )
            for name, variables in attacked.items()
        }
        after = {name: _measure(module, config, artifact.evaluation, one) for name, one in planted.items()}
    seconds, compiling = clock.read()
    result = {
        "kind": "reactivation",
        "reactivation": attack,
        "metric": getattr(module, "METRIC", "ASR after"),
        "directory": str(artifact.directory),
        **{name: artifact.manifest[name] for name in ("model", "hash")},
        "attack": artifact.experiment.attack,
        "defense": artifact.manifest.get("defense"),
        "dataset": artifact.data.name,
        "seed": seed,
        "n_test": len(artifact.evaluation.images),
        "n_asr": int(artifact.evaluation.eligible.sum()),
        "before": before["purified"],
        "after": after["purified"],
        "clean_before": before.get("clean"),
        "clean_after": after.get("clean"),
        "config": to_json(config),
        "earlier": {name: to_json(own) for name, own in configs.items()},
        "seconds": {"attack": seconds, "compile": compiling},
        "env": environment(context.devices),
    }
    if out is not None:
        _write(Path(out), result, artifact, planted["purified"])
    return result


def _read(directory: Path, dataset: str | None) -> ModelArtifact:
    found = read_recorded(checkpoint.model_directory(directory), dataset=dataset)
    check_fingerprint(found.manifest, found.data, found.directory)
    if found.manifest.get("source"):
        raise InputError(f"{directory} goes back to an imported model, and how that was trained is not known.")
    return found


def _module(attack: str) -> Any:
    module = registry.load("attacks", attack)
    if not hasattr(module, "reactivate"):
        able = [name for name in registry.names("attacks") if hasattr(registry.load("attacks", name), "reactivate")]
        raise InputError(f"{attack} is no re-activation attack. Choose from {', '.join(able)}.")
    return module


def _clean(artifact: ModelArtifact, directory: Path | None, context: Context, dataset: str | None) -> Variables:
    """Variables of the clean model, of the suspect's architecture and data set."""
    if directory is None:
        unfinished = artifact.directory.with_name(f".{artifact.directory.name}.clean-model")
        own = _at_home(artifact)
        return task_of(own, artifact.data, context, Recorder(context.tick), unfinished, Clock()).clean()
    other = _read(directory, dataset)
    for what in ("model", "shape", "classes"):
        if other.manifest[what] != artifact.manifest[what]:
            raise InputError(
                f"{directory} is not comparable: its {what} is {other.manifest[what]}, that of {artifact.directory} "
                f"is {artifact.manifest[what]}. Train one alike with `bdjax train clean`."
            )
    return other.victim.variables


def _at_home(artifact: ModelArtifact) -> Any:
    """The experiment with the seed that the victim was trained with, not the defense's."""
    return dataclasses.replace(artifact.experiment, seed=artifact.manifest["seed"])


def _again(
    artifact: ModelArtifact, attack: str, configs: Mapping[str, Any], variables: Variables, clean: Variables, name: str,
    context: Context, callback: Recorder, clock: Clock, key: Key,
) -> Backdoor:  # fmt: skip
    """The attack on one model, after those that it needs."""
    module, own, config = _module(attack), _at_home(artifact), configs[attack]
    earlier: dict[str, Variables] = {}
    for needed in getattr(module, "NEEDS", ()):
        planted = _again(artifact, needed, configs, variables, clean, name, context, callback, clock, key)
        earlier[needed] = planted.variables
    unfinished = artifact.directory.with_name(f".{artifact.directory.name}.{attack}-{name}")
    task = task_of(own, artifact.data, context, callback, unfinished, clock)
    arrays = attacks.own_arrays(checkpoint.read_arrays(artifact.directory, "trigger"))
    keys = jax.random.fold_in(key, 0), stage_key(own.seed, "attack")
    payload = attacks.payload(
        own.attack, own.attack_config, task, keys, arrays, config.count, config.payload == "triggered"
    )
    backdoor = Backdoor(own.attack, own.attack_config, variables, arrays)
    defended = ReactivationInputs(variables, earlier, clean, payload)
    found = module.reactivate(config, defended, backdoor, task, jax.random.fold_in(key, 1))
    shutil.rmtree(unfinished, ignore_errors=True)
    return found


def _measure(module: Any, config: Any, evaluation: Evaluation, planted: Backdoor) -> dict[str, float]:
    if not hasattr(module, "perturb"):
        return evaluation.measure(planted.variables)
    arrays = jax.tree.map(jnp.asarray, dict(planted.arrays))
    return evaluation.measure(planted.variables, lambda images: module.perturb(config, images, arrays))


def _write(out: Path, result: Mapping[str, Any], artifact: ModelArtifact, planted: Backdoor) -> None:
    out.mkdir(parents=True, exist_ok=True)
    manifest = {k: v for k, v in artifact.manifest.items() if k not in ("files", "format")}
    reactivated = {"name": result["reactivation"], "config": result["config"], "seed": result["seed"]}
    checkpoint.write_model(
        out / "model",
        {**manifest, "kind": "reactivated", "reactivation": reactivated},
        planted.variables,
        {"trigger": checkpoint.read_arrays(artifact.directory, "trigger"), "reactivation": planted.arrays},
    )
    checkpoint.write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
