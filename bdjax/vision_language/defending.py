"""Defense of a stored dual encoder by clean pairs, and re-activation of what a defense gave back."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax.config import to_json
from bdjax.engine.contrastive import PairFitConfig, fit_pairs
from bdjax.errors import InputError, check_fields
from bdjax.pair_types import Pairs, PairTask, PairVictim, PairView
from bdjax.types import Callback
from bdjax.vision_language import artifact, methods, prompts
from bdjax.vision_language import pairs as pair_sets
from bdjax.vision_language.artifact import DualArtifact
from bdjax.vision_language.measuring import Measure, measure_of
from bdjax.vision_language.training import check_shape


@dataclass(frozen=True)
class EvaluationOptions:
    """What a dual encoder is measured on."""

    test: str = ""
    """Labelled data set whose test images are classified, such as digits or npz:PATH; default: that of the training
    pairs."""
    templates: str = ""
    """Captions of the classes: cifar, plain, or a text file; default: those of the training."""
    images: int = 0
    """Largest number of test images; 0: all."""


@dataclass(frozen=True)
class DefendRequest:
    """A defense and its clean pairs."""

    directory: Path
    """Directory of the dual encoder."""
    defense: str
    """Name of the defense."""
    config: Any
    """Its Config."""
    pairs: str = ""
    """Specification of the clean pairs; "": the clean originals of the training pairs."""
    size: int = 5000
    """Largest number of clean pairs, drawn at random."""
    seed: int = 0
    """Seed of the defense."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


@dataclass(frozen=True)
class RetuningConfig:
    """Retuning attack (Min et al., NeurIPS 2024, arXiv:2410.09838): fine-tune with a few poisoned pairs.

    The published settings are for classifiers (SGD, 0.01, 5 epochs, 2 % of the training set with 1 to 5 poisoned
    images); for dual encoders AdamW with the learning rate of the implanting is ours.
    """

    pairs: int = 1000
    """Training pairs that the attacker fine-tunes with."""
    poisoned: int = 5
    """How many of them carry the trigger and a caption of the target."""
    epochs: int = 5
    """Passes over the pairs."""
    batch_size: int = 128
    """Pairs per step, at most their number."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "retuning",
            (("pairs", "epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("poisoned",), "from 0 to retuning.pairs", lambda v: 0 <= v <= self.pairs),
            (("learning_rate",), "positive", lambda v: v > 0),
        )


def defend(request: DefendRequest, out: Path, callback: Callback | None = None) -> dict[str, Any]:
    """Clean a dual encoder, measure it before and after, and write it.

    Args:
      request: the defense and its data.
      out: path of the new directory.
      callback: receives the progress.

    Returns:
      {"before", "after"}: measurements; "seconds", "pairs" (their number) and "directory".

    Raises:
      InputError: when the directory exists, or the pairs do not fit the model.
    """
    _check_new(out)
    dual = artifact.open_dual(request.directory)
    measure = _measure(dual, request.evaluation, request.seed)
    view, _ = clean_view(dual, request.pairs, request.size, request.seed, callback)
    spec = methods.load("defenses", request.defense)
    begin = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(request.seed), 1)
    variables = spec.purify(request.config, PairVictim(dual.encoder, dual.variables), view, key)
    jax.block_until_ready(variables)
    seconds = round(time.perf_counter() - begin, 2)
    record = _child_record(dual, "purified", request.seed) | {
        "defense": {"name": request.defense, "config": to_json(request.config), "pairs": len(view.images)},
        "seconds": seconds,
    }
    artifact.write(out, dual.encoder.config, variables, dual.tokenizer, record, _arrays(dual))
    return {
        "defense": request.defense, "pairs": len(view.images), "seed": request.seed, "seconds": seconds,
        "before": asdict(measure(dual.variables)), "after": asdict(measure(variables)), "directory": str(out),
    }  # fmt: skip


def reactivate(
    directory: Path, config: RetuningConfig, out: Path, seed: int = 0,
    evaluation: EvaluationOptions = EvaluationOptions(), callback: Callback | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Retune a purified dual encoder with a few poisoned pairs, and measure whether the backdoor returns.

    Args:
      directory: directory of the purified dual encoder; it holds the attack.
      config: the retuning.
      out: path of the new directory.
      seed: draws the pairs and the triggers.
      evaluation: what the dual encoder is measured on.
      callback: receives the progress.

    Returns:
      {"before", "after"}: measurements; the ASR after is the R-ASR.

    Raises:
      InputError: when the dual encoder has no attack, or the directory exists.
    """
    _check_new(out)
    dual = artifact.open_dual(directory)
    if dual.planted is None:
        raise InputError(f"{directory} has no attack that could be re-activated. Train one with an attack.")
    measure = _measure(dual, evaluation, seed)
    view, pairs = clean_view(dual, "", config.pairs, seed, callback)
    images, tokens = _with_payload(dual, pairs, view, config, seed)
    size = min(config.batch_size, len(images))
    fit = PairFitConfig(config.epochs, size, config.learning_rate, 0)
    key = jax.random.fold_in(jax.random.key(seed), 5)
    variables = fit_pairs(
        dual.encoder, images, tokens, fit, key, start=dual.variables, callback=callback, stage="retuning"
    )
    record = _child_record(dual, "reactivated", seed) | {"retuning": to_json(config)}
    artifact.write(out, dual.encoder.config, variables, dual.tokenizer, record, _arrays(dual))
    return {
        "retuning": to_json(config), "seed": seed, "before": asdict(measure(dual.variables)),
        "after": asdict(measure(variables)), "directory": str(out),
    }  # fmt: skip


def clean_view(
    dual: DualArtifact, spec: str, size: int, seed: int, callback: Callback | None = None
) -> tuple[PairView, Pairs]:
    """Draw clean pairs.

    Args:
      dual: the dual encoder, for its size, its tokenizer and the specification of its pairs.
      spec: specification of the pairs; "": the clean originals of its training pairs.
      size: largest number of pairs.
      seed: draws them.
      callback: passed on to the view.

    Returns:
      (the defender's view, the same pairs with their captions).

    Raises:
      InputError: when the pairs do not fit the model.
    """
    spec = spec or str(dual.manifest.get("pairs") or "")
    if not spec:
        raise InputError("an imported dual encoder has no pairs. Name the clean pairs: --pairs.")
    templates = prompts.templates(str(dual.manifest.get("templates") or "cifar"))
    pairs = pair_sets.load(spec, dual.encoder.shape[:2], templates, int(dual.manifest.get("seed", 0))).pairs
    check_shape(dual.encoder.config, pairs)
    chosen = np.random.default_rng((seed, 11)).permutation(len(pairs.captions))[:size]
    captions = tuple(pairs.captions[index] for index in chosen)
    labels = None if pairs.labels is None else pairs.labels[chosen]
    pairs = Pairs(pairs.name, pairs.images[chosen], captions, labels)
    return PairView(pairs.images, dual.tokenizer(captions), callback or Callback()), pairs


def _with_payload(
    dual: DualArtifact, pairs: Pairs, view: PairView, config: RetuningConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replace a few pairs by poisoned ones."""
    planted = dual.planted
    if planted is None or config.poisoned == 0:
        return view.images, view.tokens
    templates = prompts.templates(str(dual.manifest.get("templates") or "cifar"))
    task = PairTask(pairs, dual.encoder, dual.tokenizer, planted.target, templates)
    poison_config = type(planted.config)(**{**to_json(planted.config), "rate": config.poisoned / len(pairs.captions)})
    key = jax.random.fold_in(jax.random.key(seed), 6)
    payload = planted.spec.poison(poison_config, task, key, planted.arrays)
    images, tokens = view.images.copy(), view.tokens.copy()
    images[payload.indices], tokens[payload.indices] = payload.images, dual.tokenizer(payload.captions)
    return images, tokens


def _measure(dual: DualArtifact, options: EvaluationOptions, seed: int) -> Measure:
    return measure_of(dual, options.test, options.templates, options.images, seed)


def _arrays(dual: DualArtifact) -> dict[str, Any] | None:
    return dict(dual.planted.arrays) if dual.planted and dual.planted.arrays else None


def _child_record(dual: DualArtifact, stage: str, seed: int) -> dict[str, Any]:
    """Return the record of a dual encoder that was made of another one; its attack and its pairs stay."""
    inherited = {name: dual.manifest.get(name) for name in ("pairs", "templates", "fit", "attack", "poison", "notes")}
    return {**inherited, "stage": stage, "seed": dual.manifest.get("seed", 0), "run_seed": seed,
            "parent": dual.manifest["hash"]}  # fmt: skip


def _check_new(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists already. Choose another directory (--out).")
