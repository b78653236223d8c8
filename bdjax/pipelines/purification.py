"""Purify a model in one go: import it, audit it, clean it, audit and measure what came out, and give it back.

    OUT/model            what was imported (a directory is used where it lies)
    OUT/purified         the run of the defense, a directory like any other run's
    OUT/purified.pt      the cleaned weights, or .pth or .safetensors, as they came in
    OUT/audit.json       what the audit found, with audit.png; audit-after.json and .png: what it found afterwards
    OUT/pictures         what the report shows
    OUT/report.html      one file with everything in it, for people
    OUT/result.json      the same for programs; written last

What is measured are clean images that neither the defense nor anything chosen here has seen.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import datasets, interop, metrics
from bdjax.config import Experiment, SplitConfig, digest, run_record, to_json
from bdjax.datasets._checks import check_text
from bdjax.defenses import needs_trigger, purifier, without_trigger
from bdjax.engine import predict
from bdjax.errors import InputError
from bdjax.interop import assumptions, reader
from bdjax.io import checkpoint
from bdjax.pipelines import audit, plausibility, run
from bdjax.pipelines.artifact import ModelArtifact, open_artifact, read_recorded
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import pool
from bdjax.pipelines.victim import Context, check_fits
from bdjax.reports import audit as audit_report
from bdjax.reports import page
from bdjax.reports.imported import notes as import_notes
from bdjax.reports.purification import notes
from bdjax.types import Data

FEWEST = 10
"""Images that there must be to clean with, and to measure on."""
FEW = 500
"""Of a smaller test split the training images are taken, too."""
_JUDGED = 1000  # held-out images that an audit is given, at most
_SHOWN = 8  # pictures of predictions that changed, of each sort


def purify(
    source: Path,
    out: Path,
    defense: str = "auto",
    config: Any = None,
    *,
    clean: str | None = None,
    imported: Mapping[str, Any] | None = None,
    images: str | None = None,
    held_out: int | None = None,
    seed: int = 0,
    methods: Sequence[str] = (),
    audits: Mapping[str, Any] | None = None,
    report: bool = True,
    command: str = "",
    context: Context | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Clean the model in `source` and write all of it to `out`; a finished `out` of the very same is only read.

    Args:
      source: a weight file, or the directory of an imported model, a victim or a run (then its purified model).
      clean: data set of the clean images; None: the one that the model was trained on, which an imported one has not.
      imported: how the file is read, as `interop.import_model` takes it; of a directory only "model", for comparison.
      images: "test": the test split of the data; "all": both; None: test, of an imported model all where that has few.
      held_out: how many of them are kept from the defense, to measure on; default half. Both parts have every class as
        far as that goes.
      seed: draws the parts, and the numbers of the methods. methods: of the audit, default all. audits: their Configs.
      report: write the page. command: what the user typed, for the page. say: is told each step.

    Returns: JSON-able, the content of result.json.
    Raises InputError, and leaves no new `out` behind, for what cannot work.
    """
    context, source, out = context or Context(), Path(source), Path(out)
    module, methods = purifier(defense), audit.asked(methods)
    if out.is_file():
        raise InputError(f"--out {out} is a file. Give the name of a directory.")
    for what, path in (("the input", source), ("--out", out)):
        check_text(what, str(path))  # else the report could not be written, after all work
    config = config or module.Config()
    if needs_trigger(module, config):
        able = ", ".join(without_trigger())
        raise InputError(f"{defense} is given the true trigger, which nobody knows here. Choose from {able}.")
    incoming, manifest = _incoming(source, dict(imported or {}))
    spec = clean or (manifest.get("dataset") or {}).get("spec")
    if spec is None:
        raise InputError(f"{source} has no data set of its own. Give clean images by --clean.")
    data = datasets.load(spec)
    foreign = manifest.get("kind", "imported") == "imported"
    if not foreign and manifest["dataset"]["fingerprint"] != data.fingerprint:
        raise InputError(
            f"{spec} is not the data set that {source} was trained on or cleaned with (its fingerprint differs). Leave "
            "--clean away, or give the weights as a file (bdjax export): to a file belongs no data set."
        )
    split = _split(data, images or ("all" if foreign and len(data.y_test) < FEW else "test"), held_out)
    kept = {name: to_json(own) for name, own in (audits or {}).items()}
    identity = digest([incoming["identity"], data.fingerprint, methods, kept])
    experiment = Experiment("clean", defense, spec, "cnn", seed, defense_config=config, split=split)
    record = run_record(experiment, identity)
    with checkpoint.locked(out, context.waiting):
        if (finished := run.finished_result(out, digest(record))) is not None:
            say(f"finished before: {out}")
            if report and not (out / "report.html").exists():
                page.write(finished, out)
            return finished
        fresh = not out.exists() or not any(out.iterdir())
        try:
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(out / "config.json", json.dumps(record, indent=1) + "\n")
            model = _model(source, out, incoming, dict(imported or {}), data, say)
            artifact = open_artifact(model, defense, config, split=split, seed=seed, dataset=spec, data=data)
            asked = {"names": methods, "seed": seed, "configs": audits, "context": context}
            result = _cleaned(artifact, out, defense, config, asked, say)
        except InputError:
            if fresh:  # nothing of anyone else's was there
                shutil.rmtree(out, ignore_errors=True)
            raise
        result |= {"input": incoming, "command": command, "config_hash": digest(record)}
        result["notes"] = notes(result)
        if report:
            page.write(result, out)
        checkpoint.write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _incoming(source: Path, imported: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came in, and its manifest ({} of a file). Raises InputError for what is not there, or contradicts itself."""
    if source.exists() and not source.is_dir():
        reader.read(source)  # what is no weight file is refused before all of it is hashed
        sha256 = checkpoint.sha256(source)
        options = {name: interop.option_to_json(value) for name, value in imported.items()}
        facts = {"kind": "file", "path": str(source.absolute()), "sha256": sha256, "bytes": source.stat().st_size}
        return {**facts, "identity": digest([sha256, options])}, {}
    if not source.is_dir():
        raise InputError(f"{source} does not exist. Give a weight file, or a model directory of bdjax.")
    directory = checkpoint.model_directory(source)
    manifest = checkpoint.read_record(directory)
    name = imported.pop("model", None)
    if name not in (None, manifest["model"]):
        raise InputError(f"--model {name}, but {directory} holds a {manifest['model']}. Leave --model away.")
    if given := [flag for flag, value in imported.items() if value is not None]:
        raise InputError(f"{directory} is imported already: {', '.join(given)} of its input cannot be changed here.")
    facts = {"kind": manifest["kind"], "path": str(directory.absolute()), "sha256": manifest["hash"], "bytes": None}
    return {**facts, "identity": manifest["hash"]}, manifest


def _split(data: Data, source: str, held_out: int | None) -> SplitConfig:
    """The defender's part, by class. Raises InputError when either part is too small to do anything with."""
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


def _model(
    source: Path, out: Path, incoming: dict[str, Any], imported: dict[str, Any], data: Data, say: Callable[[str], None]
) -> Path:
    """The model directory; a file becomes OUT/model."""
    if incoming["kind"] != "file":
        return Path(incoming["path"])
    if not (out / "model").exists():
        say(f"importing {source}")
        manifest = interop.import_model(source, out / "model", **imported, env=environment())
        for line in assumptions.describe(manifest["assumed"], manifest["tried"], manifest["note"]):
            say(f"network: {line}")
        for line in import_notes(manifest):
            say(line)
    check_fits(checkpoint.read_record(out / "model"), source, data)
    return out / "model"


def _cleaned(
    artifact: ModelArtifact, out: Path, defense: str, config: Any, asked: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Audit, defend, audit again, compare, export."""
    evaluation, data, experiment = artifact.evaluation, artifact.data, artifact.experiment
    shutil.rmtree(out / "pictures", ignore_errors=True)  # of a call that was killed
    (out / "pictures").mkdir()
    say(f"{len(evaluation.clean_labels)} clean images to clean with, {len(evaluation.labels)} held out to measure on")
    model, source = artifact.victim.model, artifact.manifest.get("source")
    guess = predict(model, artifact.victim.variables, evaluation.images)
    remarks = plausibility.about(
        data, artifact.manifest, artifact.directory, guess, evaluation.labels, evaluation.targets
    )
    for line in [*remarks["data"], *(f"warning: {one}" for one in remarks["warnings"])]:
        say(line)
    before = _audited(artifact, artifact, out, "audit", asked, say)
    say(f"cleaning with {defense}")
    ran = run.defend(
        artifact.directory, defense, config, out / "purified", split=experiment.split, seed=experiment.seed,
        dataset=experiment.dataset, data=data, context=replace(asked["context"], estimate=True),
    )  # fmt: skip
    purified = read_recorded(out / "purified" / "purified", data=data)
    after = _audited(purified, artifact, out, "audit-after", asked, say)
    weights = _export(artifact, out)
    guesses = [guess, predict(model, purified.victim.variables, evaluation.images)]
    counts = [np.bincount(labels, minlength=model.classes) for labels in (evaluation.clean_labels, evaluation.labels)]
    known = None if ran["attack"] == "clean" else ran["attack"]
    named = plausibility.class_names(artifact.manifest, data)
    return {
        "kind": "purification",
        "model": {
            **{name: artifact.manifest.get(name) for name in ("model", "shape", "input")},
            "directory": str(artifact.directory.absolute()),
            "source": source,
        },
        "classes": list(named),
        "data_notes": remarks["data"],
        "warnings": remarks["warnings"],
        "data": {"spec": experiment.dataset, "name": data.name, "fingerprint": data.fingerprint},
        "split": to_json(experiment.split),
        "n_defender": len(evaluation.clean_labels),
        "n_held_out": len(evaluation.labels),
        "by_class": [list(map(int, pair)) for pair in zip(*counts, strict=True)],
        "accuracy": {
            phase: _interval(int((guess == evaluation.labels).sum()), len(guess))
            for phase, guess in zip(("before", "after"), guesses, strict=True)
        },
        "asr": None if known is None else {"attack": known, "n": ran["n_asr"],
                                           **{phase: ran[phase]["asr"] for phase in ("before", "after")}},
        "changed": _changed(evaluation.images, evaluation.labels, guesses[0], guesses[1], out),
        "audit": {"before": before, "after": after},
        "estimate": ran["estimate"],
        "rolled_back_to": next((row["rolled_back_to"] for row in ran["rounds"] if "rolled_back_to" in row), None),
        "defense": defense,
        "defense_config": to_json(config),
        "defaults": to_json(type(config)()),
        "seed": experiment.seed,
        "seconds": {"defense": ran["seconds"]["defense"], "compile": ran["seconds"]["compile"]},
        "weights": weights,
        "env": environment(asked["context"].devices),
    }  # fmt: skip


def _audited(
    judged: ModelArtifact, first: ModelArtifact, out: Path, name: str, asked: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Judge a model by the held-out images, write NAME.json and NAME.png and the pictures of the report, which needs
    what is returned."""
    say(f"auditing {judged.directory} by {', '.join(asked['names'])}")
    order = np.random.default_rng(asked["seed"]).permutation(len(first.evaluation.labels))[:_JUDGED]
    found, arrays = audit.judge(judged, first.evaluation.images[order], first.evaluation.labels[order], **asked)
    checkpoint.write_text(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    audit_report.draw(found, arrays, out / f"{name}.png")
    pictures = [
        {"file": page.picture(out, f"{name}-{method}-{place}", image), "method": method, "title": title}
        for method, images, titles in audit_report.recovered(found, arrays)[1:]
        for place, (image, title) in enumerate(zip(images, titles, strict=True))
    ]
    say(f"{name}: {audit_report.verdict(found)}")
    kept = ("poisoned", "target", "accused_by", "methods", "n", "truth")
    return {**{key: found[key] for key in kept}, "verdict": audit_report.verdict(found), "pictures": pictures}


def _export(artifact: ModelArtifact, out: Path) -> dict[str, Any]:
    """The cleaned weights, in the format that came in; of a model that was trained here as torch writes them."""
    source = artifact.manifest.get("source") or {"format": "torch", "file": ""}
    form = "safetensors" if source["format"] == "safetensors" else "torch"
    ending = ".safetensors" if form == "safetensors" else ".pth" if source["file"].lower().endswith(".pth") else ".pt"
    file = out / f"purified{ending}"
    exported = interop.export_model(out / "purified" / "purified", form, file)
    return {"file": file.name, "format": form, "sha256": checkpoint.sha256(file), **exported}


def _interval(right: int, n: int) -> dict[str, Any]:
    """An accuracy with Wilson's 95 % interval."""
    low, high = metrics.wilson(right, n)
    return {"right": right, "n": n, "rate": right / n, "low": low, "high": high}


def _changed(
    images: np.ndarray, labels: np.ndarray, before: np.ndarray, after: np.ndarray, out: Path
) -> dict[str, Any]:
    """How many predictions differ, and pictures of the first of each sort."""
    sorts = {
        "broken": (before == labels) & (after != labels),
        "mended": (before != labels) & (after == labels),
        "other": (before != labels) & (after != labels) & (before != after),
    }
    shown = [
        {"file": page.picture(out, f"changed-{sort}-{place}", images[at]), "sort": sort,
         "label": int(labels[at]), "before": int(before[at]), "after": int(after[at])}
        for sort, which in sorts.items()
        for place, at in enumerate(np.flatnonzero(which)[:_SHOWN])
    ]  # fmt: skip
    return {**{sort: int(which.sum()) for sort, which in sorts.items()}, "all": int((before != after).sum()),
            "shown": shown}  # fmt: skip
