"""Inside networks: what a defense did to the activations that carry a backdoor, beside what it did to the rates.

The victim, the purified model and, if there is one, a model trained without poison see the same held-out images, clean
and triggered: those that `bdjax evaluate` measures the purified model on. TAC finds the channels that the trigger moves
most in the victim; CKA tells how like the victim the other models are in them; BEC sets that against the clean model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import engine, metrics
from bdjax.config import stage_key, to_json
from bdjax.errors import InputError
from bdjax.pipelines.artifact import ModelArtifact
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.opening import EvaluationSource, open_together
from bdjax.pipelines.results import Rates
from bdjax.types import to_float

COUNT, FEWEST = 500, 10
FRACTIONS = (0.05, 0.1, 0.2)
"""Shares of a layer's channels, those of the victim's largest TAC, that models are compared in; rounded, at least 1."""
MAIN = 0.1
MODELS = ("victim", "purified", "clean")

_cka = jax.jit(metrics.linear_cka)


@dataclass(frozen=True)
class _Sample:
    """The held-out images that are compared."""

    evaluation: Evaluation
    clean: np.ndarray
    """int [n], positions."""
    triggered: np.ndarray
    """int [m], positions of those that the ASR counts: not of the target class."""


@dataclass(frozen=True)
class _Measurements:
    """What was measured in one model."""

    rates: Rates
    by_class: list[float | None]
    predictions: np.ndarray
    """int32 [n + m], of the clean and the triggered images."""
    tac: dict[str, np.ndarray]
    """Layer -> [C]: trigger-activated change of each channel."""
    top: dict[str, np.ndarray]
    """Layer -> indices of the channels that are compared, the victim's largest TAC first."""
    inside: dict[str, np.ndarray]
    """Layer -> [m, H, W, k]: these channels on the triggered images."""
    flat: np.ndarray
    """[n + m, D]: the features before the head, of the clean and the triggered images."""


@dataclass(frozen=True)
class InspectionRequest:
    """Models whose activations are compared."""

    victim: Path
    """Directory of the victim or of a run; or of an imported model, with an attack in `source`."""
    purified: Path
    """Directory of the purified model or of a run; a second victim is compared as it is."""
    clean: Path | None = None
    """Directory of a victim of the attack `clean`, of the same model, recipe and data but another seed (with the same
    one it starts from the victim's weights and is too similar); None: there is no BEC."""
    source: EvaluationSource = field(default_factory=EvaluationSource)
    """The data set where it has moved, and the trigger to look for in an imported model."""
    count: int | None = None
    """Held-out images to compare on; None: 500, or all if there are fewer. Rates are of all of them."""
    seed: int = 0
    """Draws the images, and the t-SNE."""
    share: float = 1.0
    """Share of the layers, counted from the last, that the means are over, in (0, 1]; BI-BAU uses 0.5."""


def inspect(
    request: InspectionRequest, tick: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """Compare a victim with what a defense made of it: rates, TAC, CKA and BEC by layer, silhouettes, t-SNE.

    Args:
      request: the models and the images.
      tick: called with the progress.

    Returns:
      JSON values; models are called "victim", "purified" and "clean", rates are fractions, and what does not exist is
      None. "layers" has TAC and, for each of FRACTIONS, similarities to the victim on triggered images.

    Raises:
      InputError: the directories do not belong together, the victim has no trigger, or a number is out of range.
    """
    share, seed = request.share, request.seed
    if not 0 < share <= 1:
        raise InputError(f"the share of layers must be in (0, 1], got {share}.")
    artifacts = open_together(request.victim, request.purified, request.clean, request.source)
    victim, sample = artifacts["victim"], _draw_sample(artifacts, request.count, seed)
    measured: dict[str, _Measurements] = {}
    for done, (name, artifact) in enumerate(artifacts.items()):
        tick("comparing activations", done, len(artifacts) + 1)
        measured[name] = _measure_model(artifact, sample, measured["victim"].top if measured else None)
    tick("t-SNE", len(artifacts), len(artifacts) + 1)
    config, evaluation = victim.experiment.attack_config, sample.evaluation
    rows = [_layer(name, measured) for name in measured["victim"].top]
    counted = rows[-max(1, round(share * len(rows))) :]
    labels = np.concatenate([evaluation.labels[sample.clean], evaluation.labels[sample.triggered]])
    groups = np.arange(len(labels)) >= len(sample.clean)
    target = None if config.labels == "all_to_all" else config.target
    phases = {"before": measured["victim"], "after": measured["purified"]}
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
        "rates": {name: measured[name].rates if name in measured else None for name in MODELS},
        "class_accuracy": {name: measured[name].by_class if name in measured else None for name in MODELS},
        "class_n": np.bincount(evaluation.labels, minlength=len(victim.data.classes)).tolist(),
        "layers": rows,
        "counted": [row["name"] for row in counted],
        "means": {str(f): _means([row["top"][str(f)] for row in counted]) for f in FRACTIONS},
        "silhouette": {phase: _silhouettes(one, labels, groups, target) for phase, one in phases.items()},
        "tsne": {
            "labels": labels.tolist(),
            "triggered": groups.tolist(),
            **{phase: metrics.tsne(one.flat, seed).astype(float).round(3).tolist() for phase, one in phases.items()},
        },
        "env": environment(1),
    }


def _draw_sample(artifacts: dict[str, ModelArtifact], count: int | None, seed: int) -> _Sample:
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


def _measure_model(artifact: ModelArtifact, sample: _Sample, top: dict[str, np.ndarray] | None) -> _Measurements:
    """Measure one model; `top`: the channels to compare by layer, None: those of the model's own largest TAC."""
    model, variables = artifact.victim.model, artifact.victim.variables
    evaluation, clean = sample.evaluation, sample.evaluation.images[sample.clean]
    triggered = evaluation.triggered[sample.triggered]
    predictions = evaluation.predictions(variables)
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
    return _Measurements(
        evaluation.rates(*predictions),
        _by_class(predictions[0], evaluation.labels, model.classes),
        np.concatenate([predictions[0][sample.clean], predictions[1][sample.triggered]]),
        tac,
        top,
        inside,
        flat,
    )


def _by_class(predictions: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """Accuracy of each class; None for a class without images."""
    own = [predictions[labels == label] == label for label in range(classes)]
    return [float(hits.mean()) if len(hits) else None for hits in own]


def _width(fraction: float, channels: int) -> int:
    return max(1, round(fraction * channels))


def _layer(name: str, measured: dict[str, _Measurements]) -> dict[str, Any]:
    victim = measured["victim"]
    channels = victim.tac[name]
    main = victim.top[name][: _width(MAIN, len(channels))]
    return {
        "name": name,
        "shape": [*victim.inside[name].shape[1:3], len(channels)],
        "tac": {
            "max": float(channels.max()),
            "median": float(np.median(channels)),
            "top": {m: float(measured[m].tac[name][main].mean()) if m in measured else None for m in MODELS},
        },
        "top": {str(f): _similarity(name, _width(f, len(channels)), measured) for f in FRACTIONS},
    }


def _similarity(name: str, width: int, measured: dict[str, _Measurements]) -> dict[str, Any]:
    """CKA of the other models with the victim in its `width` top channels, and the BEC of the purified one."""
    features = {model: one.inside[name][..., :width] for model, one in measured.items()}
    cka = {model: float(_cka(features[model], features["victim"])) for model in measured if model != "victim"}
    found: dict[str, Any] = {"channels": measured["victim"].top[name][:width].tolist(), "cka_purified": cka["purified"]}
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
    """Means over layers; the sigmoid is taken of the mean."""
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


def _silhouettes(
    measured: _Measurements, labels: np.ndarray, triggered: np.ndarray, target: int | None
) -> dict[str, Any]:
    """Silhouettes in the features before the head.

    "target_cluster": clean against triggered images among those predicted as the target (clean ones only if they are of
    it); "true_classes": the triggered images by their true classes.
    """
    cluster = np.zeros(len(labels), bool) if target is None else measured.predictions == target
    cluster &= triggered | (labels == target)
    return {
        "target_cluster": metrics.silhouette(measured.flat[cluster], triggered[cluster]),
        "n_clean": int((cluster & ~triggered).sum()),
        "n_triggered": int((cluster & triggered).sum()),
        "true_classes": metrics.silhouette(measured.flat[triggered], labels[triggered]),
    }


def _identity(artifact: ModelArtifact | None) -> dict[str, Any] | None:
    if artifact is None:
        return None
    manifest = artifact.manifest
    kept = {name: manifest[name] for name in ("kind", "hash", "seed")}
    return {"directory": str(artifact.directory), **kept, "defense": manifest.get("defense")}


def _differences(victim: ModelArtifact, clean: ModelArtifact) -> list[str]:
    """Names of the fields of the recipe, and the seed, in which the clean model differs from the victim."""
    one, two = ({"seed": s.manifest["seed"], **s.manifest["fit"]} for s in (victim, clean))
    return [name for name in one if one[name] != two.get(name)]
