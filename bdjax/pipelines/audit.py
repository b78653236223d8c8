"""Audit a model: is there a backdoor, and towards which class? Every method that can tell says what it finds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import registry
from bdjax.config import stage_key, to_json
from bdjax.engine import parallel, predict
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import plausibility
from bdjax.pipelines.artifact import ModelArtifact, read_recorded
from bdjax.pipelines.environment import environment
from bdjax.pipelines.victim import Context
from bdjax.types import DefenderView


def methods() -> list[str]:
    """The defenses that audit: those with `detect`."""
    return [name for name in registry.names("defenses") if hasattr(registry.load("defenses", name), "detect")]


def audit(
    directory: Path,
    clean: str | None = None,
    names: Sequence[str] = (),
    *,
    size: int | None = None,
    seed: int = 0,
    configs: Mapping[str, Any] | None = None,
    context: Context | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Let the methods `names` judge the model in `directory`, a run's, a victim's or imported.

    Args:
      names: default all that can, but those whose module says `ON_REQUEST` (they take many times as long).
      clean: data set whose test images are the auditor's; None: the model's own.
      size: how many of them; default 1,000, or all if there are fewer. seed: draws them, and the methods' numbers.
      configs: Configs by method, default their defaults.

    Returns: JSON-able, per method {"poisoned", "target", "score", "classes", "seconds", ...}, and what :func:`verdict`
      makes of them; and the arrays that the methods showed, as "METHOD/NAME".
    Raises InputError for a method that cannot audit, and for classes without a clean image.
    """
    names = asked(names)
    place = checkpoint.model_directory(Path(directory))
    artifact = read_recorded(place, dataset=clean)
    images, labels = _chosen(artifact, size, seed)
    guesses = predict(artifact.victim.model, artifact.victim.variables, images)
    remarks = plausibility.about(artifact.data, artifact.manifest, place, guesses, labels)
    result, arrays = judge(artifact, images, labels, names, seed=seed, configs=configs, context=context)
    return {**result, "accuracy": float((guesses == labels).mean()), **remarks}, arrays


def asked(names: Sequence[str]) -> list[str]:
    """The methods `names`, or all that can and do not wait to be named. Raises InputError for one that cannot audit."""
    able = methods()
    if unable := [name for name in names if name not in able]:
        raise InputError(f"{', '.join(unable)} cannot audit. Choose from {', '.join(able)}.")
    return list(names) or [n for n in able if not getattr(registry.load("defenses", n), "ON_REQUEST", False)]


def judge(
    artifact: ModelArtifact,
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    seed: int = 0,
    configs: Mapping[str, Any] | None = None,
    context: Context | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What :func:`audit` gives, of a suspect and of clean images (stored [n, H, W, C], int32 [n]) that are there.

    A class without an image is judged by the methods that need none of it.
    """
    context = context or Context()
    found: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    with parallel.using(context.devices):
        for name in names:
            module, clock, callback = registry.load("defenses", name), Clock(), Recorder(context.tick)
            config, key = (configs or {}).get(name) or module.Config(), stage_key(seed, "defense")
            scores = module.detect(config, artifact.victim, DefenderView(images, labels, callback), key)
            seconds, compiling = clock.read()
            shown = {k: v for row in callback.rows for k, v in row.items() if isinstance(v, float)}
            found[name] = {
                **scores.plain(),
                **{k: value if np.isfinite(value) else None for k, value in shown.items()},
                "seconds": seconds,
                "compile": compiling,
                "config": to_json(config),
            }
            arrays |= {f"{name}/{k}": v for k, v in callback.arrays.items() if not k.endswith("_first")}
    attack = artifact.experiment.attack if artifact.manifest["kind"] == "victim" else None
    result = {
        "kind": "audit",
        "directory": str(artifact.directory),
        **{name: artifact.manifest[name] for name in ("model", "hash")},
        "dataset": artifact.data.name,
        "classes": list(plausibility.class_names(artifact.manifest, artifact.data)),
        "n": len(labels),
        "seed": seed,
        "methods": found,
        **verdict(found),
        "truth": None if attack is None else {"poisoned": attack != "clean", "attack": attack},
        "env": environment(context.devices),
    }
    return result, {"clean": np.asarray(images[:8]), **arrays}


def verdict(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"poisoned", "target", "accused_by"}: poisoned when two methods accuse one class, or the only one asked does.

    Some methods accuse clean models, too, mostly of classes that do not agree (experiments/results/audit_errors). Of
    two classes with as many accusers the one counts whose first accuser stands first.
    """
    accused: dict[int, list[str]] = {}
    for name, own in found.items():
        if own["poisoned"]:
            accused.setdefault(own["target"], []).append(name)
    target = max(accused, key=lambda label: len(accused[label]), default=None)
    if target is None or len(accused[target]) < min(2, len(found)):
        return {"poisoned": False, "target": None, "accused_by": []}
    return {"poisoned": True, "target": target, "accused_by": accused[target]}


def _chosen(artifact: ModelArtifact, size: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = artifact.data.x_test, artifact.data.y_test
    if size is not None and not 1 <= size <= len(labels):
        raise InputError(
            f"--size must be from 1 to {len(labels)}, the test images of {artifact.data.name}; got {size}."
        )
    order = np.asarray(jax.random.permutation(stage_key(seed, "split"), len(labels)))[: size or 1000]
    missing = sorted(set(range(len(artifact.data.classes))) - set(labels[order].tolist()))
    if missing:
        raise InputError(
            f"no clean image of class {', '.join(map(str, missing))} among the {len(order)} of the audit: it cannot be "
            "judged. Use a larger --size or a data set with images of every class."
        )
    return images[order], labels[order]
