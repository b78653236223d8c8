"""Conversion of a model directory to a weight file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import models
from bdjax.errors import InputError
from bdjax.interop import names, writer
from bdjax.interop._tensors import DTYPES, quote
from bdjax.io import checkpoint, records
from bdjax.models import Input
from bdjax.types import Model

FORMATS = ("safetensors", "torch")


def export_model(directory: Path, form: str, out: Path) -> dict[str, Any]:
    """Write a model as a weight file, under the names that it was imported with, else the usual names.

    Args:
      directory: a model directory.
      form: one of FORMATS.
      out: path of the weight file; an existing file is replaced.

    Returns:
      {"tensors": number of tensors, "names": whose names they have, "bytes": size of the file, "input": the
      preprocessing in the manifest}.

    Raises:
      InputError: when the format is unknown or the directory is damaged.
    """
    if form not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}.")
    manifest = checkpoint.read_record(directory)
    with records.reading_record(Path(directory) / checkpoint.MANIFEST):
        model = model_of(manifest)
        like = names.variable_shapes(model)
    source = manifest.get("source")
    tables = names.namings_of_model(model.name)
    naming = names.export_naming(model.name)
    if source:
        naming = _naming_by_label(directory, tables, source["names"])
    with records.reading_record(Path(directory) / checkpoint.MANIFEST):
        entries = names.entries(naming, model)
    variables = checkpoint.read_variables(directory, like)
    if source:
        with records.reading_record(Path(directory) / checkpoint.MANIFEST):
            tensors = _imported_tensors(directory, source, entries, variables)
    else:
        tensors = _trained_tensors(entries, variables)
    checkpoint.check_space(out, sum(array.nbytes for array in tensors.values()))
    with checkpoint.atomic_file(out) as file:
        if form == "torch":
            writer.write_torch(file, tensors)
        else:
            file.write(writer.safetensors_bytes(tensors))
    size = Path(out).stat().st_size
    return {"tensors": len(tensors), "names": naming.label, "bytes": size, "input": manifest.get("input")}


def model_of(manifest: Mapping[str, Any], dtype: Any = np.float32) -> Model:
    """Return the model that a manifest describes; activations are computed in `dtype`."""
    record = manifest.get("input")
    preprocessing = None if not record else records.from_plain(Input, record, "input")
    if preprocessing is not None and preprocessing.resize > records.MAX_SIDE:
        raise InputError(
            f"input.resize is {preprocessing.resize}; images have sides of at most {records.MAX_SIDE} pixels."
        )
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    variant = models.variant(manifest.get("variant") or {})
    return models.create(manifest["model"], shape, classes, dtype, manifest.get("width"), preprocessing, variant)


def _naming_by_label(directory: Path, tables: tuple[names.Naming, ...], label: Any) -> names.Naming:
    """Return the table with a label. Raises InputError when there is none."""
    for naming in tables:
        if naming.label == label:
            return naming
    raise InputError(
        f"{directory}: source.names is {quote(label)}; known are {', '.join(naming.label for naming in tables)}. It is "
        "damaged or of another version; import the file anew."
    )


def _imported_tensors(
    directory: Path, source: Mapping[str, Any], entries: list[names.Entry], variables: Any
) -> dict[str, np.ndarray]:
    """Return the tensors of an imported model with the names, order and types of its file."""
    stored = checkpoint.read_arrays(directory, "original") if source["kept"] else {}
    original_bytes = {name: stored[str(index)] for index, name in enumerate(source["kept"])}
    by_name = {source["prefix"] + entry.name: entry for entry in entries}
    tensors = {}
    for name, dtype, shape in source["tensors"]:
        now = by_name[name].to_torch(_leaf(variables, by_name[name].path)) if name in by_name else None
        if name in original_bytes:
            original = np.frombuffer(original_bytes[name].tobytes(), DTYPES[dtype]).reshape(shape)
            if now is not None:  # unchanged values keep the bits that float32 cannot represent
                original = np.where(original.astype(np.float32) == now, original, now.astype(np.float64))
            tensors[name] = original
        elif now is not None:
            tensors[name] = now.astype(DTYPES[dtype])
    return tensors


def _trained_tensors(entries: list[names.Entry], variables: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a model trained by bdjax; batch normalisations get the counter that PyTorch expects."""
    tensors = {}
    for entry in entries:
        tensors[entry.name] = entry.to_torch(_leaf(variables, entry.path))
        if entry.path[-1] == "var":
            tensors[entry.name.replace("running_var", names.COUNTER)] = np.zeros((), np.int64)
    return tensors


def _leaf(variables: Any, path: tuple[str, ...]) -> np.ndarray:
    """Return the array at a path of the variables."""
    for part in path:
        variables = variables[part]
    return np.asarray(variables)
