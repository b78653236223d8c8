"""Inside networks: what a defense did to the activations that carry a backdoor, beside what it did to the rates.

The victim, the purified model and, if there is one, a model trained without poison see the same held-out images, clean
and triggered: those that `bdjax evaluate` measures the purified model on. TAC finds the channels that the trigger moves
most in the victim; CKA tells how like the victim the other models are in them; BEC sets that against the clean model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import engine, metrics
from bdjax.config import stage_key, to_json
from bdjax.errors import InputError
from bdjax.pipelines.artifact import ModelArtifact, read_together
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import Evaluation
from bdjax.types import to_float

COUNT, FEWEST = 500, 10
FRACTIONS = (0.05, 0.1, 0.2)
"""Shares of a layer's channels, those of the victim's largest TAC, that models are compared in; rounded, at least 1."""
MAIN = 0.1
MODELS = ("victim", "purified", "clean")

_cka = jax.jit(metrics.linear_cka)


@dataclass(frozen=True)
class _Sample:
    """Which held-out images are looked at."""

    evaluation: Evaluation
    clean: np.ndarray
    """int [n], positions."""
    triggered: np.ndarray
    """int [m], those of them that are eligible: not of the target class."""


@dataclass(frozen=True)
class _Seen:
    """What was seen of a model."""

    rates: dict[str, float]
    by_class: list[float | None]
    guesses: np.ndarray
    """int32 [n + m], of the sample's clean and triggered images."""
    tac: dict[str, np.ndarray]
    """Layer -> [C]."""
    top: dict[str, np.ndarray]
    """Layer -> the channels that are compared, the victim's largest TAC first."""
    inside: dict[str, np.ndarray]
    """Layer -> [m, H, W, k], these channels on the triggered images."""
    flat: np.ndarray
    """[n + m, D], the last feature of the clean and the triggered images."""


def inspect(
    victim_dir: Path,
    purified_dir: Path,
    clean_dir: Path | None = None,
    dataset: str | None = None,
    count: int | None = None,
    seed: int = 0,
    *,
    share: float = 1.0,
    attack: str | None = None,
    attack_config: Any = None,
    tick: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compare a victim with what a defense made of it.

    Args:
      victim_dir, purified_dir: directories of models, or of a run that has them in it. A second victim in place of the
        purified model is compared as it is.
      clean_dir: a victim of the attack `clean`, of the same model, recipe and data but of another seed (of the same it
        begins with the victim's weights, and is too like it to measure by); without it there is no BEC.
      dataset: where the data set lies now, if it has moved.
      count: held-out images to look at; default 500, or all if there are fewer. Rates are of all of them.
      seed: decides which these are, and the t-SNE.
      share: of the layers, counted from the last, that the means are over, in (0, 1]; BI-BAU takes 0.5.
      attack, attack_config: the trigger to look for in an imported model, on `dataset`.

    Returns: JSON-able; models are called "victim", "purified" and "clean", rates are fractions, and what is not there
      is None. "layers" has TAC and, for each of FRACTIONS, similarities to the victim on triggered images.

    Raises: InputError when the directories do not belong together, the victim has no trigger, or a number is out of
    range.
    """
    if not 0 < share <= 1:
        raise InputError(f"the share of layers must be in (0, 1], got {share}.")
    artifacts = read_together(victim_dir, purified_dir, clean_dir, dataset, attack, attack_config)
    victim, sample = artifacts["victim"], _drawn(artifacts, count, seed)
    seen: dict[str, _Seen] = {}
    for done, (name, artifact) in enumerate(artifacts.items()):
        tick("looking inside", done, len(artifacts) + 1)
        seen[name] = _look(artifact, sample, seen["victim"].top if seen else None)
    tick("t-SNE", len(artifacts), len(artifacts) + 1)
    config, evaluation = victim.experiment.attack_config, sample.evaluation
    rows = [_layer(name, seen) for name in seen["victim"].top]
    counted = rows[-max(1, round(share * len(rows))) :]
    labels = np.concatenate([evaluation.labels[sample.clean], evaluation.labels[sample.triggered]])
    groups = np.arange(len(labels)) >= len(sample.clean)
    target = None if config.labels == "all_to_all" else config.target
    phases = {"before": seen["victim"], "after": seen["purified"]}
    return {
        "kind": "inspection",
        "attack": victim.experiment.attack,
        "attack_config": to_json(config),
        "dataset": victim.data.name,
        "model": victim.manifest["model"],
        "models": {name: _identity(artifacts.get(name)) for name in MODELS},
        "clean_differs": _differences(victim, artifacts["clean"]) if "clean" in artifacts else None,
        "seed": seed,
        "target": target,
        "classes": list(victim.data.classes),
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        "n_clean": len(sample.clean),
        "n_triggered": len(sample.triggered),
        "rates": {name: seen[name].rates if name in seen else None for name in MODELS},
        "class_accuracy": {name: seen[name].by_class if name in seen else None for name in MODELS},
        "class_n": np.bincount(evaluation.labels, minlength=len(victim.data.classes)).tolist(),
        "layers": rows,
        "counted": [row["name"] for row in counted],
        "means": {str(f): _means([row["top"][str(f)] for row in counted]) for f in FRACTIONS},
        "silhouette": {phase: _apart(one, labels, groups, target) for phase, one in phases.items()},
        "tsne": {
            "labels": labels.tolist(),
            "triggered": groups.tolist(),
            **{phase: metrics.tsne(one.flat, seed).astype(float).round(3).tolist() for phase, one in phases.items()},
        },
        "env": environment(1),
    }


def _drawn(artifacts: dict[str, ModelArtifact], count: int | None, seed: int) -> _Sample:
    recorded = artifacts["purified" if artifacts["purified"].manifest["kind"] == "purified" else "victim"]
    evaluation = recorded.evaluation
    available = len(evaluation.images)
    if count is not None and not FEWEST <= count <= available:
        raise InputError(
            f"count must be from {FEWEST} to {available}, the test images that the defender did not have, got {count}."
        )
    order = jax.random.permutation(stage_key(seed, "evaluate"), available)
    clean = np.sort(np.asarray(order)[: count or COUNT])
    triggered = clean[evaluation.eligible[clean]]
    if np.array_equal(to_float(evaluation.images[triggered]), to_float(evaluation.triggered[triggered])):
        raise InputError(
            f"{recorded.directory} has no trigger to look for: {recorded.experiment.attack} leaves the images as they "
            "are. Give a victim of an attack."
        )
    if len(triggered) < 2 or len(clean) < FEWEST:
        raise InputError(
            f"{len(clean)} held-out images, {len(triggered)} of them not of the target class, are too few to look "
            f"inside a model with; {FEWEST} and 2 are needed."
        )
    return _Sample(evaluation, clean, triggered)


def _look(artifact: ModelArtifact, sample: _Sample, top: dict[str, np.ndarray] | None) -> _Seen:
    """`top`: the channels to compare; None: find them by the model's own TAC."""
    model, variables = artifact.victim.model, artifact.victim.variables
    evaluation, clean = sample.evaluation, sample.evaluation.images[sample.clean]
    triggered = evaluation.triggered[sample.triggered]
    guesses = evaluation.predictions(variables)
    tac = engine.activation_changes(model, variables, evaluation.images[sample.triggered], triggered)
    if top is None:
        names = engine.feature_map_names(model, variables)
        if not names:
            raise InputError(f"{artifact.directory}: no feature of model {model.name!r} is a map [N, H, W, C].")
        order = {name: np.argsort(-tac[name], kind="stable").astype(np.int32) for name in names}
        top = {name: channels[: _width(max(FRACTIONS), len(channels))] for name, channels in order.items()}
    inside, flat = engine.activations(model, variables, triggered, top)
    flat = np.concatenate([engine.activations(model, variables, clean, {})[1], flat])
    for name, values in {**inside, "before the last": flat}.items():
        if not np.isfinite(values).all():
            raise InputError(f"{artifact.directory}: layer {name} has values that are not finite; the model is broken.")
    return _Seen(
        evaluation.rates(*guesses),
        _by_class(guesses[0], evaluation.labels, model.classes),
        np.concatenate([guesses[0][sample.clean], guesses[1][sample.triggered]]),
        tac,
        top,
        inside,
        flat,
    )


def _by_class(guesses: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """Accuracy of each class; None where no image is of it."""
    own = [guesses[labels == label] == label for label in range(classes)]
    return [float(hits.mean()) if len(hits) else None for hits in own]


def _width(fraction: float, channels: int) -> int:
    return max(1, round(fraction * channels))


def _layer(name: str, seen: dict[str, _Seen]) -> dict[str, Any]:
    victim = seen["victim"]
    channels = victim.tac[name]
    main = victim.top[name][: _width(MAIN, len(channels))]
    return {
        "name": name,
        "shape": [*victim.inside[name].shape[1:3], len(channels)],
        "tac": {
            "max": float(channels.max()),
            "median": float(np.median(channels)),
            "top": {m: float(seen[m].tac[name][main].mean()) if m in seen else None for m in MODELS},
        },
        "top": {str(f): _similar(name, _width(f, len(channels)), seen) for f in FRACTIONS},
    }


def _similar(name: str, width: int, seen: dict[str, _Seen]) -> dict[str, Any]:
    """CKA of the other models with the victim in its `width` top channels, and the BEC of the purified one."""
    features = {model: one.inside[name][..., :width] for model, one in seen.items()}
    cka = {model: float(_cka(features[model], features["victim"])) for model in seen if model != "victim"}
    found: dict[str, Any] = {"channels": seen["victim"].top[name][:width].tolist(), "cka_purified": cka["purified"]}
    if "clean" not in cka:
        return {**found, "cka_clean": None, "bec": None, "clipped": None}
    existence = metrics.bec(*(jnp.float32(cka[model])[None] for model in ("purified", "clean")))
    return {
        **found,
        "cka_clean": cka["clean"],
        "bec": float(existence.mean),
        "clipped": bool(existence.clipped),
    }


def _means(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the layers that count; the sigmoid is that of the mean."""
    purified = float(np.mean([layer["cka_purified"] for layer in layers]))
    if layers[0]["bec"] is None:
        return {"cka_purified": purified, "cka_clean": None, "bec": None, "bec_sigmoid": None, "clipped": None}
    value = float(np.mean([layer["bec"] for layer in layers]))
    return {
        "cka_purified": purified,
        "cka_clean": float(np.mean([layer["cka_clean"] for layer in layers])),
        "bec": value,
        "bec_sigmoid": float(metrics.bec_sigmoid(jnp.float32(value))),
        "clipped": sum(layer["clipped"] for layer in layers),
    }


def _apart(seen: _Seen, labels: np.ndarray, triggered: np.ndarray, target: int | None) -> dict[str, Any]:
    """Clean against triggered images within the target's cluster, which is what the model takes for the target (and, of
    the clean, is of it); and the triggered ones by their true classes. All in the features before the head."""
    cluster = np.zeros(len(labels), bool) if target is None else seen.guesses == target
    cluster &= triggered | (labels == target)
    return {
        "target_cluster": metrics.silhouette(seen.flat[cluster], triggered[cluster]),
        "n_clean": int((cluster & ~triggered).sum()),
        "n_triggered": int((cluster & triggered).sum()),
        "true_classes": metrics.silhouette(seen.flat[triggered], labels[triggered]),
    }


def _identity(artifact: ModelArtifact | None) -> dict[str, Any] | None:
    if artifact is None:
        return None
    manifest = artifact.manifest
    kept = {name: manifest[name] for name in ("kind", "hash", "seed")}
    return {"directory": str(artifact.directory), **kept, "defense": manifest.get("defense")}


def _differences(victim: ModelArtifact, clean: ModelArtifact) -> list[str]:
    """Fields of the recipe in which the clean model is not the victim's equal, and the seed (which should be one)."""
    one, two = ({"seed": s.manifest["seed"], **s.manifest["fit"]} for s in (victim, clean))
    return [name for name in one if one[name] != two.get(name)]
