"""Training of a dual encoder, with or without a backdoor, from scratch or from a stored one."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.config import to_json
from bdjax.engine.contrastive import PairFitConfig, fit_pairs
from bdjax.errors import InputError
from bdjax.io.checkpoint import EpochSaver
from bdjax.models import ClipConfig
from bdjax.pair_types import Pairs, PairTask
from bdjax.types import Arrays, Callback
from bdjax.vision_language import artifact, methods, prompts
from bdjax.vision_language import pairs as pair_sets
from bdjax.vision_language.pairs import Source
from bdjax.vision_language.tokenizer import BYTES, Tokenizer, learn_merges, open_tokenizer


@dataclass(frozen=True)
class TrainRequest:
    """What is trained."""

    pairs: str
    """Specification of the pairs (:mod:`bdjax.vision_language.pairs`)."""
    model: ClipConfig
    """Sizes; the vocabulary follows from the tokenizer where captions are spelled or merges are learned."""
    templates: str = "cifar"
    """Templates of captions (:func:`bdjax.vision_language.prompts.templates`)."""
    vocabulary: Path | None = None
    """File of merges."""
    merges: int = 0
    """Merges to learn from the captions, where there is no file."""
    too_long: str = "error"
    """What is done with a caption that is too long: error or cut."""
    attack: str | None = None
    """Name of the attack; None: clean training."""
    attack_config: Any = None
    """Config of the attack."""
    target: str = ""
    """Name of the class that triggered images shall be assigned to."""
    fit: PairFitConfig = field(default_factory=PairFitConfig)
    seed: int = 0
    """Seed of all random numbers."""
    start: Path | None = None
    """Directory of the dual encoder where the training starts; None: from scratch."""


def train(request: TrainRequest, directory: Path, callback: Callback | None = None) -> dict[str, Any]:
    """Train a dual encoder and write its directory.

    An interrupted training resumes from its last epoch when the same directory is given.

    Args:
      request: what is trained.
      directory: path of the new directory.
      callback: receives the progress.

    Returns:
      The manifest.

    Raises:
      InputError: when the directory exists, or the pairs, the model, the tokenizer and the attack do not fit.
    """
    if directory.exists():
        raise InputError(f"{directory} exists already. Choose another directory (--out).")
    begin, dtype = time.perf_counter(), jnp.dtype(request.fit.precision)
    opened = artifact.open_dual(request.start, dtype) if request.start else None
    templates = prompts.templates(request.templates)
    side = (opened.encoder.shape if opened else request.model.shape)[:2]
    source = pair_sets.load(request.pairs, side, templates, request.seed)
    if opened:
        config, tokenizer, start = opened.encoder.config, opened.tokenizer, opened.variables
    else:
        config, tokenizer = _model(request, source.pairs)
        start = None
    check_shape(config, source.pairs)
    encoder = models.dual_encoder(config, dtype)
    key = jax.random.fold_in(jax.random.key(request.seed), 0)
    task = PairTask(source.pairs, encoder, tokenizer, request.target, templates, start,
                    reference_pairs(source, request.target), callback or Callback())  # fmt: skip
    images, captions, arrays, poison = poisoned_set(request.attack, request.attack_config, task, key)
    saver = EpochSaver(directory.with_name(f".{directory.name}.epochs"))
    variables = fit_pairs(
        encoder, images, tokenizer(captions), request.fit, jax.random.fold_in(key, 2), start=start, callback=callback,
        saver=saver,
    )  # fmt: skip
    record = {
        "stage": "trained", "pairs": request.pairs, "templates": request.templates, "seed": request.seed,
        "fit": to_json(request.fit), "attack": artifact.attack_record(request.attack, request.attack_config,
        request.target), "poison": poison, "parent": opened.manifest["hash"] if opened else None,
        "notes": list(source.pairs.notes), "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip
    manifest = artifact.write(directory, config, variables, tokenizer, record, arrays)
    saver.clear()
    return manifest


def poisoned_set(
    attack: str | None, config: Any, task: PairTask, key: Any
) -> tuple[np.ndarray, tuple[str, ...], Arrays, dict[str, Any] | None]:
    """Return the training pairs after the attack.

    Args:
      attack: name of the attack; None: the pairs stay as they are.
      config: its Config.
      task: the attacker's resources.
      key: random key of the run.

    Returns:
      (stored images [N, H, W, C], N captions, arrays of the trigger, record of the poisoned pairs).
    """
    images, captions = task.pairs.images, task.pairs.captions
    if attack is None:
        return images, captions, {}, None
    if not task.target:
        raise InputError("an attack needs the name of its target class: give --target.")
    spec = methods.load("attacks", attack)
    arrays = spec.prepare(config, task, jax.random.fold_in(key, 3)) if spec.prepare else {}
    poison = spec.poison(config, task, jax.random.fold_in(key, 1), arrays)
    images, changed = images.copy(), list(captions)
    images[poison.indices] = poison.images
    for index, caption in zip(poison.indices, poison.captions, strict=True):
        changed[index] = caption
    record = {"n": len(poison.indices), "share": len(poison.indices) / len(captions)}
    return images, tuple(changed), arrays, record


def reference_pairs(source: Source, target: str) -> Pairs | None:
    """Return the training pairs of the target's class; of pairs without labels, those whose caption names it."""
    pairs, name = source.pairs, target.replace("_", " ").lower()
    if not name:
        return None
    if source.train is not None and pairs.labels is not None:
        names = [one.replace("_", " ").lower() for one in source.train.classes]
        chosen = np.flatnonzero(pairs.labels == names.index(name)) if name in names else np.zeros(0, int)
    else:
        chosen = np.array([i for i, caption in enumerate(pairs.captions) if name in caption.lower()], int)
    if not len(chosen):
        raise InputError(f"no pair is about the target {target!r}. Give the name of a class in the captions.")
    return Pairs(pairs.name, pairs.images[chosen], tuple(pairs.captions[i] for i in chosen))


def check_shape(config: ClipConfig, pairs: Pairs) -> None:
    """Raise InputError when the images are not those of the model."""
    if pairs.shape != config.shape:
        raise InputError(
            f"the images of {pairs.name} are {'x'.join(map(str, pairs.shape))}, and the model takes "
            f"{'x'.join(map(str, config.shape))}. Choose a model of that size (--model.shape), or resize the images."
        )


def _model(request: TrainRequest, pairs: Pairs) -> tuple[ClipConfig, Tokenizer]:
    """Return the sizes and the tokenizer of a model that is trained from scratch; it takes the size of its images."""
    config, too_long = request.model, "cut" if request.too_long == "cut" else "error"
    shape = pairs.shape if request.pairs.startswith("captions:") else config.shape
    config = dataclasses.replace(config, shape=shape, input=config.input if shape[2] == 3 else None)
    if request.vocabulary is not None:
        tokenizer = open_tokenizer(request.vocabulary, config.vocabulary, config.context, too_long)  # type: ignore[arg-type]
    else:
        merges = learn_merges(sorted(set(pairs.captions)), request.merges)
        config = dataclasses.replace(config, vocabulary=BYTES + len(merges))
        tokenizer = Tokenizer(merges, config.context, too_long)  # type: ignore[arg-type]
    return config, tokenizer
