"""Models from PyTorch and back: weight files without PyTorch, matched by name and shape, never by position.

`import_model` makes a model directory of a weight file, `export_model` a weight file of a model directory. What came in
goes out with the same names, order, types and bits: what the variables do not keep (the counters of batch
normalisation, the halves of double precision) stays beside them in original.npz.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import models
from bdjax.errors import InputError
from bdjax.interop import _crc, _metadata, assumptions, matching, names, reader, writer
from bdjax.interop._tensors import DTYPES, Refused, quote
from bdjax.io import checkpoint, records
from bdjax.models import Input

__all__ = ["export_model", "import_model", "model_of", "option_to_json"]

FORMATS = ("safetensors", "torch")
_LISTED = 1000  # entries that were passed over, in a manifest


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
    """Make the model directory `out` of a weight file, and return its manifest.

    Args:
      file: safetensors, or what torch.save writes or wrote: a state dict, bare or inside other dictionaries.
      model: name in bdjax.models; default what the file says ("model_name", as BackdoorBench stores it).
      classes: default what the file says ("num_classes"), else the outputs of its last layer.
      size: (H, W) of the images; default what the file or its weights tell, else the model's usual.
      input: what the owner did to images in [0, 1] before; default nothing, or what BackdoorBench does to its sets.
      key: which dictionary of the file holds the weights, where several fit.
      ignore: names of tensors that the model need not have (`_metadata.ignored_tensors`); they are kept for the export.
      network: options of it that no file tells ({"stem": "max"}); default what is usual. The manifest lists under
        "assumed" what was taken and what else the file would fit.
      measure: `measure(model, variables) -> accuracy` on clean images; of the networks that the file fits, the most
        accurate one is taken, and the manifest lists each one's accuracy under "tried".
      env: goes into the manifest.

    Raises InputError, and writes nothing, when the file is not read, when anything is missing, left over or of another
    shape (in two columns), or a weight is not a finite number.
    """
    file = Path(file)
    form, value = reader.read(file)
    try:
        dicts, others = reader.state_dicts(value), reader.skipped_objects(value)
    except Refused as refused:
        raise InputError(f"{file} is not read: {refused}.") from None
    if not dicts:
        reader.check_has_tensors(file, value, others)
    facts = value if isinstance(value, dict) else {}
    name = _model(file, model, facts)
    classes, size, input = _metadata.backdoorbench_facts(facts, classes, size, input)
    wanted = matching.ModelFacts(name, classes, size, input, chosen=network or {})
    strangers = reader.other_objects(value)
    waived = _metadata.ignored_tensors(file, dicts, ignore, (name for held in strangers.values() for name in held))
    dicts = {place: _metadata.apply_masks(tensors, waived[place]) for place, tensors in dicts.items()}
    every = frozenset[str]().union(*waived.values())
    dicts = dicts if key is None else {key: matching.tensors_under(file, dicts, key)}
    ignored = {place: waived.get(place, every) for place in dicts}
    inputs, layers = _metadata.normalisation(file, dicts, wanted.input, ignored)
    left = {place: names | layers.get(place, frozenset()) for place, names in ignored.items()}
    strange = {place: _metadata.objects_under(place, strangers) for place in dicts}
    wanted = dataclasses.replace(wanted, inputs=inputs, waived=left, strange=strange)
    fit = matching.best_fit(file, dicts, wanted, None)
    try:
        _crc.check(file)
    except Refused as refused:
        raise InputError(f"{file} is not read: {refused}.") from None
    _metadata.check_plain_tensors(file, fit.key, strange[fit.key], ignore)
    named = _metadata.class_names(value, fit.model.classes)
    variables, kept = _variables(file, fit)
    tried: list[dict[str, Any]] = []
    if measure is not None:
        only = {fit.key: fit.tensors}
        fit, tried = assumptions.best_variant(
            fit, wanted, lambda other: matching.best_fit(file, only, other, None), variables, measure
        )
    arrays = {"original": {str(place): array for place, array in enumerate(kept.values())}} if kept else {}
    sha256 = checkpoint.sha256(file)
    manifest: dict[str, Any] = {
        "kind": "imported",
        "model": fit.model.name,
        **{option: option_to_json(given) for option, given in fit.model.options},
        "variant": _json(dict(dict(fit.model.options)["variant"])),
        "shape": list(fit.model.shape),
        "classes": list(named[0]) if named else [str(label) for label in range(fit.model.classes)],
        "assumed": assumptions.assumption_record(fit, network or {}, tried),
        "tried": tried,
        "note": fit.naming.note,
        "source": {
            "file": file.name,
            "sha256": sha256,
            "format": form,
            "names": fit.naming.label,
            "key": fit.key,
            "prefix": fit.prefix,
            "tensors": [[name, tensor.dtype, list(tensor.shape)] for name, tensor in fit.tensors.items()],
            "kept": list(kept),
            "skipped": dict(list(others.items())[:_LISTED]),
            "ignored": sorted(every & set(fit.tensors)),
            "normalised": sorted(layers.get(fit.key, ())),
            "classes": named[1] if named else None,
            "unnamed": None if named else _metadata.class_names_problem(value, fit.model.classes),
            "accuracy": _metadata.accuracy(value),
        },
    }
    described = {what: manifest[what] for what in ("model", "width", "input", "shape", "classes")}
    described |= {"variant": manifest["variant"]} if manifest["variant"] else {}
    manifest["hash"] = hashlib.sha256(json.dumps([sha256, fit.key, described], sort_keys=True).encode()).hexdigest()
    own: dict[str, Any] = {
        "seed": 0,
        "fit": None,
        "attack": None,
        "dataset": None,
        "poison": None,
        "curve": [],
        "env": dict(env or {}),
    }
    manifest |= own | {"seconds": {"attack": 0.0, "compile": 0.0}}
    checkpoint.write_model(out, manifest, variables, arrays)
    return manifest


def export_model(directory: Path, form: str, out: Path) -> dict[str, Any]:
    """Write the model in `directory` as a weight file: under the names it was imported with, else the usual ones.

    Args: form: one of FORMATS; out: a file that stands there is replaced.
    Returns {"tensors": number, "names": whose, "bytes": of the file, "input": what the manifest says is done first}.
    Raises InputError for a damaged directory.
    """
    if form not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}.")
    manifest = checkpoint.read_record(directory)
    with records.reading_record(Path(directory) / checkpoint.MANIFEST):
        model = model_of(manifest)
        like = names.variable_shapes(model)
    source = manifest.get("source")
    known = names.namings_of_model(model.name)
    naming = names.export_naming(model.name)
    if source:
        naming = _named(directory, known, source["names"])
    with records.reading_record(Path(directory) / checkpoint.MANIFEST):
        entries = names.entries(naming, model)
    variables = checkpoint.read_variables(directory, like)
    if source:
        with records.reading_record(Path(directory) / checkpoint.MANIFEST):
            tensors = _original(directory, source, entries, variables)
    else:
        tensors = _fresh(entries, variables)
    need = sum(array.nbytes for array in tensors.values())
    checkpoint.check_space(out, need)
    with checkpoint.atomic_file(out) as file:
        if form == "torch":
            writer.write_torch(file, tensors)
        else:
            file.write(writer.safetensors_bytes(tensors))
    size = Path(out).stat().st_size
    return {"tensors": len(tensors), "names": naming.label, "bytes": size, "input": manifest.get("input")}


def model_of(manifest: Mapping[str, Any], dtype: Any = np.float32) -> models.Model:
    """The model that a manifest describes."""
    given = manifest.get("input")
    done = None if not given else records.from_plain(Input, given, "input")
    if done is not None and done.resize > records.MAX_SIDE:
        raise InputError(f"input.resize is {done.resize}; images have sides of at most {records.MAX_SIDE} pixels.")
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    own = models.variant(manifest.get("variant") or {})
    return models.create(manifest["model"], shape, classes, dtype, manifest.get("width"), done, own)


def _named(directory: Path, known: tuple[names.Naming, ...], label: Any) -> names.Naming:
    for naming in known:
        if naming.label == label:
            return naming
    raise InputError(
        f"{directory}: source.names is {quote(label)}; known are {', '.join(naming.label for naming in known)}. It is "
        "damaged or of another version; import the file anew."
    )


def _json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are read back: lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _model(file: Path, given: str | None, facts: Mapping[Any, Any]) -> str:
    found = given if given is not None else facts.get("model_name")
    if not isinstance(found, str):
        raise InputError(f"{file} does not say which model it is of. Give --model: {', '.join(names.families())}.")
    name = names.family(found)
    if given is None and not names.is_known(name):
        raise InputError(f"{file} is of a model {quote(found)}; these can be read: {', '.join(names.families())}.")
    return name


def option_to_json(given: Any) -> Any:
    """An option of a model as JSON takes it."""
    return dataclasses.asdict(given) if isinstance(given, Input) else given


def _variables(file: Path, fit: matching.Fit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The variables, and what they do not keep: its tensors by name, as bytes."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    kept = {}
    for entry in fit.entries:
        name = fit.prefix + entry.name
        tensor = fit.tensors[name]
        found = tensor.read()
        with np.errstate(over="ignore"):
            array = found.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise InputError(
                f"{file} is not read: tensor {quote(name)} holds values that are no finite float32 numbers."
            )
        if entry.path[-1] == "var" and (array < 0).any():
            raise InputError(f"{file} is not read: tensor {quote(name)} is a variance and holds negative values.")
        if tensor.dtype == "float64":
            kept[name] = _bytes(found)
        *folders, leaf = entry.path
        place = variables
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = np.ascontiguousarray(entry.to_bdjax(array))
    needed = {fit.prefix + entry.name for entry in fit.entries}
    kept |= {name: _bytes(tensor.read()) for name, tensor in fit.tensors.items() if name not in needed}
    return variables, kept


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def _original(
    directory: Path, source: Mapping[str, Any], entries: list[names.Entry], variables: Any
) -> dict[str, np.ndarray]:
    """The tensors of an imported model in its file's names, order and types."""
    stored = checkpoint.read_arrays(directory, "original") if source["kept"] else {}
    kept = {name: stored[str(place)] for place, name in enumerate(source["kept"])}
    ours = {source["prefix"] + entry.name: entry for entry in entries}
    tensors = {}
    for name, dtype, shape in source["tensors"]:
        now = ours[name].to_torch(_at(variables, ours[name].path)) if name in ours else None
        if name in kept:
            before = np.frombuffer(kept[name].tobytes(), DTYPES[dtype]).reshape(shape)
            if now is not None:  # what no method has changed keeps the bits that float32 cannot hold
                before = np.where(before.astype(np.float32) == now, before, now.astype(np.float64))
            tensors[name] = before
        elif now is not None:
            tensors[name] = now.astype(DTYPES[dtype])
    return tensors


def _fresh(entries: list[names.Entry], variables: Any) -> dict[str, np.ndarray]:
    """The tensors of a model that was trained here; a batch normalisation gets the counter that PyTorch expects."""
    tensors = {}
    for entry in entries:
        tensors[entry.name] = entry.to_torch(_at(variables, entry.path))
        if entry.path[-1] == "var":
            tensors[entry.name.replace("running_var", names.COUNTER)] = np.zeros((), np.int64)
    return tensors


def _at(variables: Any, path: tuple[str, ...]) -> np.ndarray:
    for part in path:
        variables = variables[part]
    return np.asarray(variables)
