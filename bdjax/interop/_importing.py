"""Conversion of a weight file to a model directory."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax.errors import InputError
from bdjax.interop import _crc, _metadata, assumptions, matching, names, reader
from bdjax.interop._tensors import Refused, Tensor, quote
from bdjax.io import checkpoint
from bdjax.models import Input

_LISTED = 1000  # largest number of skipped objects in a manifest


def import_model(
    file: Path,
    out: Path,
    *,
    model: str | None = None,
    classes: int | None = None,
    size: tuple[int, int] | None = None,
    input: Input | None = None,
    key: str | None = None,
    ignore: Sequence[str] = (),
    network: Mapping[str, Any] | None = None,
    measure: assumptions.Measure | None = None,
    env: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert a weight file to a model directory.

    Args:
      file: a safetensors file or a file of torch.save: a state dict, bare or inside other dictionaries.
      out: path of the new model directory.
      model: name in bdjax.models; default: what the file says ("model_name", as BackdoorBench stores it).
      classes: number of classes; default: what the file says ("num_classes"), else the outputs of its last layer.
      size: (H, W) of the images; default: what the file or its weights imply, else the usual size of the model.
      input: preprocessing that the owner applied to images in [0, 1]; default: none, or BackdoorBench's for its data.
      key: name of the dictionary in the file that holds the weights, needed when several fit.
      ignore: names of tensors that need no counterpart in the model (see `_metadata.ignored_tensors`); they are kept
        for the export.
      network: options of the network that a file cannot tell, such as {"stem": "max"}; default: the usual ones. The
        manifest lists under "assumed" what was chosen and what else the file would fit.
      measure: `measure(model, variables) -> accuracy` on clean images. Of the networks that fit the file, the most
        accurate one is chosen, and the manifest lists all accuracies under "tried".
      env: environment record for the manifest.

    Returns:
      The manifest.

    Raises:
      InputError: when the file cannot be read, when tensors are missing, left over or of another shape (listed in two
        columns), or when a weight is NaN or infinite. Nothing is written then.
    """
    file = Path(file)
    contents = _read(file)
    facts = _model_facts(file, contents, model, classes, size, input, network)
    candidates = _candidates(file, contents, facts, key, ignore)
    fit = matching.best_fit(file, candidates.dicts, candidates.facts, None)
    try:
        _crc.check(file)
    except Refused as refused:
        raise InputError(f"{file} is not read: {refused}.") from None
    _metadata.check_plain_tensors(file, fit.key, candidates.facts.other_objects[fit.key], ignore)
    class_names = _metadata.class_names(contents.value, fit.model.classes)
    variables, extra = _variables(file, fit)
    tried: list[dict[str, Any]] = []
    if measure is not None:
        chosen = {fit.key: fit.tensors}
        fit, tried = assumptions.best_variant(
            fit, candidates.facts, lambda other: matching.best_fit(file, chosen, other, None), variables, measure
        )
    manifest: dict[str, Any] = {
        **_model_record(fit, class_names),
        "assumed": assumptions.assumption_record(fit, network or {}, tried),
        "tried": tried,
        "note": fit.naming.note,
        "source": _source_record(file, contents, candidates, fit, list(extra), class_names),
    }
    manifest["hash"] = _identity(manifest)
    manifest |= {
        "seed": 0,
        "fit": None,
        "attack": None,
        "dataset": None,
        "poison": None,
        "curve": [],
        "env": dict(env or {}),
        "seconds": {"attack": 0.0, "compile": 0.0},
    }
    arrays = {"original": {str(index): array for index, array in enumerate(extra.values())}} if extra else {}
    checkpoint.write_model(out, manifest, variables, arrays)
    return manifest


class _Contents(NamedTuple):
    """Contents of a weight file."""

    form: str
    value: Any
    """Dictionaries, lists, plain values and tensors."""
    dicts: dict[str, dict[str, Tensor]]
    """Dictionaries of tensors by their place in the file."""
    skipped: dict[str, str]
    """Objects that were passed over: place -> name of the type."""


def _read(file: Path) -> _Contents:
    """Read a weight file and find its dictionaries of tensors."""
    form, value = reader.read(file)
    try:
        dicts, skipped = reader.state_dicts(value), reader.skipped_objects(value)
    except Refused as refused:
        raise InputError(f"{file} is not read: {refused}.") from None
    if not dicts:
        reader.check_has_tensors(file, value, skipped)
    return _Contents(form, value, dicts, skipped)


def _model_facts(
    file: Path,
    contents: _Contents,
    model: str | None,
    classes: int | None,
    size: tuple[int, int] | None,
    input: Input | None,
    network: Mapping[str, Any] | None,
) -> matching.ModelFacts:
    """Combine what the user states about the model with what the file says."""
    facts = contents.value if isinstance(contents.value, dict) else {}
    name = _model_name(file, model, facts)
    classes, size, input = _metadata.backdoorbench_facts(facts, classes, size, input)
    return matching.ModelFacts(name, classes, size, input, chosen=network or {})


def _model_name(file: Path, stated: str | None, facts: Mapping[Any, Any]) -> str:
    """Return the model's name as the tables of :mod:`bdjax.interop.names` have it."""
    model = stated if stated is not None else facts.get("model_name")
    if not isinstance(model, str):
        raise InputError(f"{file} does not say which model it is of. Give --model: {', '.join(names.families())}.")
    name = names.family(model)
    if stated is None and not names.is_known(name):
        raise InputError(f"{file} is of a model {quote(model)}; these can be read: {', '.join(names.families())}.")
    return name


class _Candidates(NamedTuple):
    """The dictionaries that may hold the model's weights, and what is known of each."""

    dicts: dict[str, dict[str, Tensor]]
    facts: matching.ModelFacts
    ignored: frozenset[str]
    """All tensors that the user excluded."""
    normalisation: dict[str, frozenset[str]]
    """By dictionary: the tensors of its input normalisation layer."""


def _candidates(
    file: Path, contents: _Contents, facts: matching.ModelFacts, key: str | None, ignore: Sequence[str]
) -> _Candidates:
    """Apply --key and --ignore, prune masks, and normalisation layers to the dictionaries of a file."""
    objects = reader.other_objects(contents.value)
    object_names = (name for in_dictionary in objects.values() for name in in_dictionary)
    ignored = _metadata.ignored_tensors(file, contents.dicts, ignore, object_names)
    dicts = {place: _metadata.apply_masks(tensors, ignored[place]) for place, tensors in contents.dicts.items()}
    all_ignored = frozenset[str]().union(*ignored.values())
    dicts = dicts if key is None else {key: matching.tensors_under(file, dicts, key)}
    ignored = {place: ignored.get(place, all_ignored) for place in dicts}
    inputs, layers = _metadata.normalisation(file, dicts, facts.input, ignored)
    facts = dataclasses.replace(
        facts,
        inputs=inputs,
        unmatched={place: names | layers.get(place, frozenset()) for place, names in ignored.items()},
        other_objects={place: _metadata.objects_under(place, objects) for place in dicts},
    )
    return _Candidates(dicts, facts, all_ignored, layers)


def _variables(file: Path, fit: matching.Fit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the variables, and by name the bytes of the tensors that the variables do not represent."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    extra = {}
    for entry in fit.entries:
        name = fit.prefix + entry.name
        tensor = fit.tensors[name]
        stored = tensor.read()
        with np.errstate(over="ignore"):
            array = stored.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise InputError(f"{file} is not read: tensor {quote(name)} contains NaN or Inf in float32.")
        if entry.path[-1] == "var" and (array < 0).any():
            raise InputError(f"{file} is not read: tensor {quote(name)} is a variance and holds negative values.")
        if tensor.dtype == "float64":
            extra[name] = _bytes(stored)
        *folders, leaf = entry.path
        parent = variables
        for folder in folders:
            parent = parent.setdefault(folder, {})
        parent[leaf] = np.ascontiguousarray(entry.to_bdjax(array))
    needed = {fit.prefix + entry.name for entry in fit.entries}
    extra |= {name: _bytes(tensor.read()) for name, tensor in fit.tensors.items() if name not in needed}
    return variables, extra


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array, uint8."""
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def _model_record(fit: matching.Fit, class_names: tuple[tuple[str, ...], str] | None) -> dict[str, Any]:
    """Return the fields of the manifest that describe the network."""
    return {
        "kind": "imported",
        "model": fit.model.name,
        **{option: option_to_json(value) for option, value in fit.model.options},
        "variant": _json(dict(dict(fit.model.options)["variant"])),
        "shape": list(fit.model.shape),
        "classes": list(class_names[0]) if class_names else [str(label) for label in range(fit.model.classes)],
    }


def _source_record(
    file: Path,
    contents: _Contents,
    candidates: _Candidates,
    fit: matching.Fit,
    extra: list[str],
    class_names: tuple[tuple[str, ...], str] | None,
) -> dict[str, Any]:
    """Return the field of the manifest that describes the file, from which the export restores it."""
    return {
        "file": file.name,
        "sha256": checkpoint.sha256(file),
        "format": contents.form,
        "names": fit.naming.label,
        "key": fit.key,
        "prefix": fit.prefix,
        "tensors": [[name, tensor.dtype, list(tensor.shape)] for name, tensor in fit.tensors.items()],
        "kept": extra,
        "skipped": dict(list(contents.skipped.items())[:_LISTED]),
        "ignored": sorted(candidates.ignored & set(fit.tensors)),
        "normalised": sorted(candidates.normalisation.get(fit.key, ())),
        "classes": class_names[1] if class_names else None,
        "unnamed": None if class_names else _metadata.class_names_problem(contents.value, fit.model.classes),
        "accuracy": _metadata.accuracy(contents.value),
    }


def _identity(manifest: Mapping[str, Any]) -> str:
    """Return the hash of the file, the dictionary in it, and the network."""
    network = {field: manifest[field] for field in ("model", "width", "input", "shape", "classes")}
    network |= {"variant": manifest["variant"]} if manifest["variant"] else {}
    source = manifest["source"]
    return hashlib.sha256(json.dumps([source["sha256"], source["key"], network], sort_keys=True).encode()).hexdigest()


def _json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON gives them back, with lists in place of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def option_to_json(value: Any) -> Any:
    """Return an option of a model as a JSON value."""
    return dataclasses.asdict(value) if isinstance(value, Input) else value
