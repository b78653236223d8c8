"""Directories of dual encoders: weights, sizes, tokenizer, and what is known of the training and the trigger.

They are model directories of :mod:`bdjax.io.checkpoint` of the kind "dual_encoder": sealed manifest, hashes of all
files, nothing unpickled. The file tokenizer.npz holds the merges; trigger.npz the arrays of the attack.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import models
from bdjax.config import digest, from_json, to_json
from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.models import ClipConfig, Input
from bdjax.pair_types import DualEncoder, PairAttackSpec
from bdjax.types import Arrays, Variables
from bdjax.vision_language import methods
from bdjax.vision_language.tokenizer import Merge, Tokenizer

KIND = "dual_encoder"
_LARGEST = {"vision_width": 4096, "text_width": 4096, "text_depth": 64, "context": 4096, "vocabulary": 1 << 20,
            "dimension": 4096, "patch": records.MAX_SIDE, "vision_heads": 1024, "text_heads": 1024}  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """The attack of a dual encoder."""

    spec: PairAttackSpec
    config: Any
    target: str
    arrays: Arrays


@dataclass(frozen=True)
class DualArtifact:
    """A dual encoder that was read from its directory."""

    encoder: DualEncoder
    variables: Variables
    tokenizer: Tokenizer
    planted: Planted | None
    manifest: Mapping[str, Any]
    """"stage" (trained, imported, purified, reactivated), "pairs" and "test" (specifications), "templates", "fit",
    "seed", "attack", "source", "parent" (hash), "hash"."""


def write(
    directory: Path, config: ClipConfig, variables: Variables, tokenizer: Tokenizer, record: Mapping[str, Any],
    arrays: Arrays | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a dual encoder.

    Args:
      directory: path of the new directory.
      config: sizes of the dual encoder.
      variables: its variables.
      tokenizer: its tokenizer.
      record: JSON values for the manifest (see :class:`DualArtifact`).
      arrays: arrays of the trigger; None: there is no attack.

    Returns:
      The manifest.

    Raises:
      InputError: when the directory exists already.
    """
    manifest = {**record, "kind": KIND, "model": to_json(config), "too_long": tokenizer.too_long}
    manifest["hash"] = digest({name: value for name, value in manifest.items() if name != "seconds"})
    text = "\n".join(" ".join(pair) for pair in tokenizer.merges).encode()
    groups: dict[str, dict[str, np.ndarray]] = {"tokenizer": {"merges": np.frombuffer(text, np.uint8)}}
    if arrays:
        groups["trigger"] = {name: np.asarray(value) for name, value in arrays.items()}
    checkpoint.write_model(directory, manifest, variables, groups)
    return manifest


def is_dual_encoder(directory: Path) -> bool:
    """Whether a directory is one of a dual encoder, by its manifest. Raises InputError when it is damaged."""
    return bool(checkpoint.read_manifest(directory).get("kind") == KIND)


def open_dual(directory: Path, dtype: Any = jnp.float32) -> DualArtifact:
    """Read a dual encoder.

    Args:
      directory: its directory.
      dtype: dtype of the activations.

    Returns:
      The dual encoder.

    Raises:
      InputError: when the directory is damaged, or holds a classifier.
    """
    directory = Path(directory)
    manifest = checkpoint.read_manifest(checkpoint.model_directory(directory))
    path = directory / checkpoint.MANIFEST
    if manifest.get("kind") != KIND:
        kind = manifest.get("kind")
        raise InputError(
            f"{directory} holds a classifier ({str(manifest.get('model'))[:40]!r}, {str(kind)[:20]!r}), and a dual "
            "encoder is needed. Train one by `bdjax clip train`, or import one by `bdjax clip import`."
        )
    directory = checkpoint.model_directory(directory)
    with records.reading_record(path):
        config = config_from_json(manifest["model"])
        encoder = models.dual_encoder(config, dtype)
        like = jax.eval_shape(encoder.init, jax.random.key(0))
        merges = _merges(checkpoint.read_arrays(directory, "tokenizer")["merges"])
        tokenizer = Tokenizer(merges, config.context, "cut" if manifest["too_long"] == "cut" else "error")
        if tokenizer.vocabulary != config.vocabulary:
            raise InputError(f"its tokenizer has {tokenizer.vocabulary} tokens, its model {config.vocabulary}.")
        planted = _planted(manifest, directory)
    variables = checkpoint.read_variables(directory, like)
    return DualArtifact(encoder, variables, tokenizer, planted, manifest)


def config_from_json(values: Mapping[str, Any]) -> ClipConfig:
    """Read the sizes of a dual encoder from a manifest. Raises InputError for values that are out of range."""
    values = dict(values)
    for name, largest in _LARGEST.items():
        if type(values.get(name)) is not int or not 1 <= values[name] <= largest:
            raise InputError(f"model.{name} is {values.get(name)!r}; it must be from 1 to {largest}.")
    preprocessing = values.pop("input", None)
    config: ClipConfig = from_json(ClipConfig, {**values, "input": None}, "model")
    depths = config.vision_depths
    if max(config.shape) > records.MAX_SIDE or max(depths) > 64:
        raise InputError(f"model.shape is {config.shape} and model.vision_depths {depths}: too large.")
    input = None if preprocessing is None else from_json(Input, preprocessing, "input")
    return dataclasses.replace(config, input=input)


def attack_record(attack: str | None, config: Any, target: str) -> dict[str, Any] | None:
    """Return the record of an attack for a manifest.

    Args:
      attack: its name; None: there is none.
      config: its Config.
      target: name of its target class.

    Returns:
      The record; None without an attack.
    """
    return None if attack is None else {"name": attack, "config": to_json(config), "target": target}


def _planted(manifest: Mapping[str, Any], directory: Path) -> Planted | None:
    """Read the attack of a manifest; only installed attacks are looked up."""
    record = manifest.get("attack")
    if record is None:
        return None
    spec = methods.load("attacks", str(record["name"]))
    config = from_json(spec.Config, record["config"], "attack")
    stored = checkpoint.read_arrays(directory, "trigger") if (directory / "trigger.npz").exists() else {}
    return Planted(spec, config, str(record["target"]), stored)


def _merges(stored: np.ndarray) -> tuple[Merge, ...]:
    """Read the merges from their bytes."""
    lines = [line.split(" ") for line in bytes(stored.tobytes()).decode().split("\n") if line]
    return tuple((first, second) for first, second in lines)
