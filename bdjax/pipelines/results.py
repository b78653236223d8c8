"""The typed records of finished runs, and how a stored one of an earlier version is read.

A record is a dictionary of JSON values, so that result.json is the record itself; the classes here give every field
its name, type and meaning. `schema` is the version of the format. Records of older versions are completed by
:func:`upgrade`, the only place that knows them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.io.files import read_record

SCHEMA = 2
"""Version of the records that are written now. 1: without `schema`, and before estimates and warnings were recorded."""


class Rates(TypedDict):
    """Rates of one model on held-out images, fractions in [0, 1]; None where no trigger is known."""

    acc: float
    """Accuracy on clean images (ACC)."""
    asr: float | None
    """Attack success rate (ASR) on triggered images that are not of the target class; the mean over the parts of an
    attack that has several triggers."""
    asr_with_target: float | None
    """The same with images of the target class counted, as I-BAU's release does."""
    ctca: float | None
    """Clean accuracy of the target class; None where the attack has no single target."""
    asr_by_trigger: NotRequired[dict[str, float]]
    """By the label of a part, where an attack has several triggers."""


class Seconds(TypedDict):
    """Wall time in seconds."""

    attack: float
    """Training of the victim."""
    defense: float
    """The defense, without compilation and measurements."""
    compile: float
    """Compilation of both."""
    estimate: NotRequired[float]
    """The estimate of success without the trigger."""


class Truth(TypedDict):
    """What is known of a model beside a detection."""

    poisoned: bool
    targets: list[int]


class Detection(TypedDict):
    """What a detector said of the model before the defense."""

    poisoned: bool
    target: int
    score: float | None
    classes: list[float | None]
    """How suspicious each class is; None where it could not be judged."""
    truth: Truth | None
    """None for an imported model."""
    seconds: NotRequired[float]


class RunResult(TypedDict):
    """result.json of a run: a victim, a defense, and the rates before and after it."""

    schema: int
    attack: str
    defense: str
    dataset: str
    model: str
    seed: int
    n_test: int
    """Held-out images that the accuracy is measured on."""
    n_asr: int
    """Of these (times the parts of the attack) those that the ASR is measured on."""
    n_defender: int
    """Clean images of the defender."""
    n_validation: int
    """Of these the ones that the defense does not learn from and is judged by."""
    before: Rates
    after: Rates
    clean: Rates | None
    """Rates of a model trained alike without poison."""
    score: float | None
    """AGE's score in [0, 1]; None without a clean model or a trigger."""
    estimate: dict[str, Any] | None
    """Estimate of the ASR without the trigger (:mod:`bdjax.defenses._success`)."""
    detection: Detection | None
    seconds: Seconds
    peak_memory_bytes: int | None
    peak_memory_of: str
    """"device" or "process"."""
    data: list[str]
    """Sentences about the data set."""
    warnings: list[str]
    """What speaks against the numbers."""
    rounds: list[dict[str, Any]]
    """The curve: a row of scalars for each recorded round."""
    n_rounds: int
    """Held-out images that the curve is measured on."""
    attack_config: dict[str, Any]
    defense_config: dict[str, Any]
    fit: dict[str, Any]
    split: dict[str, Any]
    victim_hash: str
    config_hash: str
    env: dict[str, Any]
    cell: NotRequired[dict[str, Any]]
    """Which cell of a grid this run is, with the published cell beside it."""


class VictimResult(TypedDict):
    """result.json of a cell without a defense: a victim that was trained and measured."""

    kind: str
    """"victim"."""
    attack: str
    dataset: str
    model: str
    seed: int
    n_test: int
    """Test images that the accuracy is measured on."""
    n_asr: int
    before: Rates
    """Rates of the victim."""
    clean: Rates | None
    """Rates of a model trained alike without poison, with the same trigger."""
    seconds: dict[str, float]
    """Of the training and of its compilation."""
    attack_config: dict[str, Any]
    fit: dict[str, Any]
    victim_hash: str
    env: dict[str, Any]
    cell: dict[str, Any]


class EvaluationResult(TypedDict):
    """What `bdjax evaluate` prints."""

    directory: str
    kind: str
    attack: str | None
    dataset: str
    n_test: int
    n_asr: int
    acc: float
    asr: float | None
    asr_with_target: float | None
    ctca: float | None
    asr_by_trigger: NotRequired[dict[str, float]]
    data: list[str]
    warnings: list[str]


class AuditResult(TypedDict):
    """audit.json: what the detectors found, and the verdict."""

    kind: str
    """"audit"."""
    directory: str
    model: str
    hash: str
    dataset: str
    classes: list[str]
    n: int
    """Clean images that the detectors were given."""
    seed: int
    level: float
    """Level of the verdict: largest corrected p-value that convicts."""
    references: list[str]
    """Directories of the clean models that the p-values compare with; empty: the classes are compared."""
    methods: dict[str, dict[str, Any]]
    """By detector: poisoned, target, targets, score, p_value, classes, seconds, compile, config and its own scalars."""
    skipped: list[str]
    """Detectors that did not run because the budget was spent."""
    poisoned: bool
    """The verdict."""
    target: int | None
    targets: list[int]
    """All accused classes, the one with the smallest p-value first."""
    accused_by: list[str]
    """Detectors that accuse the target."""
    p_value: float | None
    """Smallest p-value of the detectors, corrected for their number; None when no detector has one."""
    truth: dict[str, Any] | None
    """Of a victim that was trained here: whether it is poisoned, and by which attack."""
    env: dict[str, Any]
    accuracy: NotRequired[float]
    """Of the model on these images, a fraction."""
    data: NotRequired[list[str]]
    warnings: NotRequired[list[str]]


class ReactivationResult(TypedDict):
    """result.json of a re-activation attack."""

    kind: str
    """"reactivation"."""
    reactivation: str
    """Name of the attack."""
    metric: str
    """What its ASR is called: R-ASR or Q-ASR."""
    directory: str
    model: str
    hash: str
    attack: str
    defense: dict[str, Any] | None
    dataset: str
    seed: int
    n_test: int
    n_asr: int
    before: Rates
    """Of the purified model."""
    after: Rates
    """Of the re-activated one."""
    clean_before: Rates | None
    clean_after: Rates | None
    """The same of a model trained without poison; None when it was not attacked."""
    config: dict[str, Any]
    earlier: dict[str, dict[str, Any]]
    """Configs of the re-activation attacks that came before."""
    seconds: dict[str, float]
    env: dict[str, Any]


class PurifyResult(TypedDict):
    """result.json of `bdjax purify`."""

    kind: str
    """"purification"."""
    model: dict[str, Any]
    classes: list[str]
    data_notes: list[str]
    warnings: list[str]
    data: dict[str, str]
    split: dict[str, Any]
    n_defender: int
    n_held_out: int
    """Clean images that neither the defense nor anything chosen here has seen."""
    by_class: list[list[int]]
    """For each class: images of the defender, and held-out ones."""
    accuracy: dict[str, dict[str, float]]
    """"before" and "after": right, n, rate, and Wilson's 95 % interval low, high."""
    asr: dict[str, Any] | None
    """Of a victim with a known trigger: attack, n, before, after."""
    changed: dict[str, Any]
    """Predictions that differ: broken, mended, other, all, and pictures of some."""
    audit: dict[str, dict[str, Any]]
    """"before" and "after": verdict, methods, pictures."""
    estimate: dict[str, Any] | None
    rolled_back_to: float | None
    """Round that was returned because accuracy fell too far after it; 0: the model as it came in."""
    defense: str
    defense_config: dict[str, Any]
    defaults: dict[str, Any]
    seed: int
    seconds: dict[str, float]
    weights: dict[str, Any]
    """The exported file."""
    env: dict[str, Any]
    input: NotRequired[dict[str, Any]]
    command: NotRequired[str]
    config_hash: NotRequired[str]
    notes: NotRequired[list[str]]


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a run's record of an earlier schema version; fields that it could not have are None or empty.

    Raises InputError for a record of a later version.
    """
    if "kind" in record:  # of a purification, an audit or a re-activation, which have one version
        return dict(record)
    version = record.get("schema", 1)
    if type(version) is not int or version > SCHEMA:
        raise InputError(f"it is of schema {version!r}; this version of bdjax reads up to {SCHEMA}. Update bdjax.")
    if version == SCHEMA:
        return dict(record)
    absent: dict[str, Any] = {
        "clean": None,
        "score": None,
        "estimate": None,
        "detection": None,
        "data": [],
        "warnings": [],
    }
    return {**absent, **record, "schema": SCHEMA}


def read_result(directory: Path) -> RunResult | None:
    """The result.json of a finished run, or None. Raises InputError when it is damaged."""
    path = Path(directory) / "result.json"
    if not os.path.lexists(path):
        return None
    with records.reading_record(path):
        return upgrade({**read_record(path)})  # type: ignore[return-value]


def write_json(path: Path, value: Any) -> None:
    """Write a record, whole or not at all."""
    checkpoint.write_text(path, json.dumps(value, indent=1) + "\n")
