"""A request to purify a model, and the same with everything looked up and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import datasets, interop, registry
from bdjax.config import Experiment, SplitConfig, digest, run_record, to_json
from bdjax.datasets._checks import check_text
from bdjax.defenses import without_trigger
from bdjax.errors import InputError
from bdjax.interop import reader
from bdjax.io import checkpoint
from bdjax.pipelines.audit import choose_detectors
from bdjax.pipelines.evaluation import pool
from bdjax.types import Data

FEWEST = 10
"""Images that there must be to clean with, and to measure on."""
FEW = 500
"""With fewer test images the training images are taken as well."""


@dataclass(frozen=True)
class PurifyRequest:
    """What is purified, with which clean images, by which defense."""

    source: Path
    """A weight file, or the directory of an imported model, a victim or a run (then its purified model)."""
    defense: str = "auto"
    config: Any = None
    """The defense's Config; None: the defaults."""
    clean_data: str | None = None
    """Data set of the clean images; None: the one that the model was trained on, which an imported one has not."""
    import_options: Mapping[str, Any] = field(default_factory=dict)
    """How a file is read, as `interop.import_model` takes it; for a directory only "model", for comparison."""
    images: str | None = None
    """"test": the test split of the data; "all": both splits; None: test, or all for an imported model with few."""
    held_out: int | None = None
    """How many of them are kept from the defense, to measure on; None: half. Both parts have every class where it has
    two images."""
    seed: int = 0
    """Draws the parts, and the random numbers of the methods."""
    detectors: Sequence[str] = ()
    """Of the audits; none: the default ones."""
    detector_configs: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    """What the user typed, for the page."""


@dataclass(frozen=True)
class ResolvedPurification:
    """A purification whose input, data, split and hash are known and checked."""

    request: PurifyRequest
    config: Any
    detectors: Sequence[str]
    input: Mapping[str, Any]
    dataset: str
    data: Data
    split: SplitConfig
    record: Mapping[str, Any]
    hash: str


def resolve_purification(request: PurifyRequest, out: Path) -> ResolvedPurification:
    """Look up method, input and data, and refuse what cannot work.

    Raises InputError for an unknown method, an input or data that do not fit, and parts that are too small.
    """
    spec, detectors = registry.load("defenses", request.defense), choose_detectors(request.detectors)
    source = Path(request.source)
    if out.is_file():
        raise InputError(f"--out {out} is a file. Give the name of a directory.")
    for name, path in (("the input", source), ("--out", out)):
        check_text(name, str(path))  # else the report could not be written, after all work
    config = request.config if request.config is not None else spec.Config()
    if spec.needs_trigger(config):
        able = ", ".join(without_trigger())
        raise InputError(f"{request.defense} is given the true trigger, which nobody knows here. Choose from {able}.")
    facts, manifest = _describe_input(source, dict(request.import_options))
    dataset = request.clean_data or (manifest.get("dataset") or {}).get("spec")
    if dataset is None:
        raise InputError(f"{source} has no data set of its own. Give clean images by --clean-data.")
    data = datasets.load(dataset)
    imported = manifest.get("kind", "imported") == "imported"
    if not imported and manifest["dataset"]["fingerprint"] != data.fingerprint:
        raise InputError(
            f"{dataset} is not the data set that {source} was trained on or cleaned with (its fingerprint differs). "
            "Leave --clean-data away, or give the weights as a file (bdjax export): to a file belongs no data set."
        )
    default_images = "all" if imported and len(data.y_test) < FEW else "test"
    split = _split(data, request.images or default_images, request.held_out)
    configs = {name: to_json(value) for name, value in request.detector_configs.items()}
    identity = digest([facts["identity"], data.fingerprint, detectors, configs])
    experiment = Experiment("clean", request.defense, dataset, "cnn", request.seed, defense_config=config, split=split)
    record = run_record(experiment, identity)
    return ResolvedPurification(request, config, detectors, facts, dataset, data, split, record, digest(record))


def _describe_input(source: Path, options: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Facts about the input, and its manifest ({} for a file). Raises InputError when they contradict the options."""
    if source.exists() and not source.is_dir():
        reader.read(source)  # refuses what is no weight file before all of it is hashed
        sha256 = checkpoint.sha256(source)
        identity = digest([sha256, {name: interop.option_to_json(value) for name, value in options.items()}])
        facts = {"kind": "file", "path": str(source.absolute()), "sha256": sha256, "bytes": source.stat().st_size}
        return {**facts, "identity": identity}, {}
    if not source.is_dir():
        raise InputError(f"{source} does not exist. Give a weight file, or a model directory of bdjax.")
    directory = checkpoint.model_directory(source)
    manifest = checkpoint.read_record(directory)
    name = options.pop("model", None)
    if name not in (None, manifest["model"]):
        raise InputError(f"--model {name}, but {directory} holds a {manifest['model']}. Leave --model away.")
    if flags := [flag for flag, value in options.items() if value is not None]:
        raise InputError(f"{directory} is imported already: {', '.join(flags)} of its input cannot be changed here.")
    facts = {"kind": manifest["kind"], "path": str(directory.absolute()), "sha256": manifest["hash"], "bytes": None}
    return {**facts, "identity": manifest["hash"]}, manifest


def _split(data: Data, source: str, held_out: int | None) -> SplitConfig:
    """The defender's stratified part. Raises InputError when either part is too small."""
    labels = pool(source, data)[1]
    more = "" if source == "all" else f" (the test split; --images all takes all {len(data.y_train) + len(labels)})"
    if len(labels) < 2 * FEWEST or len(np.unique(labels)) < 2:
        raise InputError(
            f"{data.name} has {len(labels)} clean images of {len(np.unique(labels))} classes{more}. Needed are "
            f"{2 * FEWEST} of two classes or more, {FEWEST} to clean with and {FEWEST} to measure on; some hundred are "
            "better."
        )
    size = len(labels) - (len(labels) // 2 if held_out is None else held_out)
    if not FEWEST <= size <= len(labels) - FEWEST:
        raise InputError(
            f"--held-out must be from {FEWEST} to {len(labels) - FEWEST}, for there are {len(labels)} clean "
            f"images{more}; got {held_out}."
        )
    return SplitConfig("all" if source == "all" else "test", size, "stratified")
