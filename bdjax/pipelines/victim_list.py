"""Lists of victims that an experiment measures defenses on: JSON files, and directories that `bdjax train` wrote."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdjax.errors import InputError
from bdjax.io import checkpoint

_FIELDS = ("name", "set", "path", "dataset", "model", "attack", "attack_config")


def read_victims(sources: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Read victims from lists and directories.

    A list is a JSON file with an entry {"name", "set", "path", "dataset", "model", "attack", "attack_config"} for each
    victim, whose paths are relative to the file. "path" is a victim directory, whose manifest supplies what the entry
    leaves out, or a weight file.

    Args:
      sources: paths of lists (.json) and of victim directories.

    Yields:
      For each victim the same fields, with paths that do not depend on the list; "set" is empty for a directory.

    Raises:
      InputError: for a list that does not exist, an entry with a gap, and a directory of another kind.
    """
    for source in map(Path, sources):
        if source.suffix != ".json":
            yield _recorded(source)
        elif source.is_file():
            for entry in json.loads(source.read_text()):
                yield _listed(entry, source)
        else:
            raise InputError(f"no such file: {source}. Say by --victims where the victims are.")


def _recorded(directory: Path) -> dict[str, Any]:
    """A victim that `bdjax train` wrote, by its manifest."""
    manifest = checkpoint.read_record(directory)
    if manifest["kind"] != "victim":
        raise InputError(f"{directory} holds a model of kind {manifest['kind']!r}. Give directories of `bdjax train`.")
    return {
        "name": directory.name,
        "set": "",
        "path": directory,
        "dataset": manifest["dataset"]["spec"],
        "model": manifest["model"],
        "attack": manifest["attack"]["name"],
        "attack_config": manifest["attack"]["config"],
    }


def _listed(entry: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A victim of a list."""
    folder = file.parent
    path = folder / entry.get("path", "")
    given = {**entry, "path": path} if "path" in entry else dict(entry)
    if "dataset" in given:
        kind, _, place = given["dataset"].partition(":")
        given["dataset"] = f"{kind}:{folder / place}" if place and kind != "tfds" else given["dataset"]
    if "attack_config" in given:
        given["attack_config"] = {
            name: str(folder / value) if name in ("trigger", "mask") else value
            for name, value in given["attack_config"].items()
        }
    fields = {**(_recorded(path) if "path" in given and (path / checkpoint.MANIFEST).is_file() else {}), **given}
    if missing := [name for name in _FIELDS if name not in fields]:
        raise InputError(
            f"{file}: the victim {entry.get('name', entry)} lacks {', '.join(missing)}. Only a victim directory says "
            "itself what its model and attack are."
        )
    return fields
