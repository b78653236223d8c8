"""Read weight files without PyTorch and without running any code in them.

Supported are safetensors and the files of torch.save, as a zip (since PyTorch 1.6) or in the legacy format, whatever
their names. A `.pt` file is a pickle, which is a program; only the part of it that describes tensors, NumPy arrays,
dictionaries and plain values is interpreted (`_pickle`), and sizes are checked before anything is read (`_files`).
Other objects become placeholders and are never built; `skipped_objects` lists them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdjax.errors import InputError
from bdjax.interop import _files, _globals
from bdjax.interop._arrays import Array
from bdjax.interop._globals import Global, Skipped
from bdjax.interop._tensors import Refused, Tensor
from bdjax.io.files import MAX_WEIGHTS, open_regular

_DEPTH, _MAX_VISITED = 8, 10_000
_MAX_TENSORS, _MAX_IN_ALL = 20_000, 100_000  # largest number of named tensors in one dictionary, and in all
_LONGEST_NAME = 500  # largest number of characters of a tensor's name
_SHORT = 64  # largest number of entries of a list or tuple that are examined
_LONGEST = 200  # largest number of characters of a key within a place
_HDF5, _HDF5_PLACES = b"\x89HDF\r\n\x1a\n", (0, 512, 1024, 2048)  # positions of the signature, after a user block
_OTHERS = {
    b"TFL3": "it is a TensorFlow Lite program, which is not read. Give the weights that it was converted from",
    b"(\xb5/\xfd": "it is compressed by zstd. Unpack it: unzstd FILE",
    b"7z\xbc\xaf": "it is a 7z archive. Unpack it (7z x FILE) and give the weight file that was in it",
    b"\x1f\x8b": "it is compressed by gzip. Unpack it: gunzip FILE",
    b"BZh": "it is compressed by bzip2. Unpack it: bunzip2 FILE",
    b"\xfd7zXZ": "it is compressed by xz. Unpack it: unxz FILE",
}


def read(path: Path) -> tuple[str, Any]:
    """Return the format of a weight file ("safetensors", "torch" or "torch before 1.6") and its value.

    The value consists of dictionaries, lists, tuples, plain values, placeholders and `Tensor`s, whose elements are not
    read yet. Raises InputError for other and damaged files.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise InputError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}. Give a weight file.")
    with open_regular(path, MAX_WEIGHTS, "a weight file") as file:
        head = file.read(_HDF5_PLACES[-1] + len(_HDF5))
    try:
        return _open(path, head)
    except Refused as refused:
        raise InputError(f"{path} is not read: {refused}.") from None


def _open(path: Path, head: bytes) -> tuple[str, Any]:
    """Open a file by the format that its first bytes indicate. Raises Refused for other formats."""
    if any(head.startswith(_HDF5, position) for position in _HDF5_PLACES):
        raise Refused(f"it is an HDF5 file. {_files.KERAS}")
    if head[:2] == b"PK":
        return "torch", _files.open_zip(path)
    if head[:1] == b"\x80" and head[8:9] != b"{":
        return "torch before 1.6", _files.open_legacy(path)
    if head[8:9] == b"{":
        return "safetensors", _files.open_safetensors(path)
    for signature, reason in _OTHERS.items():
        if head.startswith(signature) or (signature == b"TFL3" and head.startswith(signature, 4)):
            raise Refused(reason)
    if head[257:262] == b"ustar":
        raise Refused("it is a tar archive. Unpack it (tar -xf FILE) and give the weight file that was in it")
    raise Refused("it is neither a safetensors file nor one of torch.save")


def state_dicts(value: Any) -> dict[str, dict[str, Tensor]]:
    """Find all dictionaries of named tensors: place in the file ("" for `value` itself) -> tensors by name.

    Searches dictionaries, and short lists and tuples, whose entries are addressed by their number ("0.state_dict"). A
    list of (name, tensor) pairs counts as a dictionary, a NumPy array as a tensor. Raises Refused when there are more
    tensors, or longer names, than in any model.
    """
    count = 0
    dicts: dict[str, dict[str, Tensor]] = {}
    for place, container in _containers(value):
        pairs = _pairs(container) if isinstance(container, list | tuple) else container
        named = {key: _tensor(entry) for key, entry in pairs.items() if type(key) is str}
        tensors = {key: tensor for key, tensor in named.items() if tensor is not None}
        if tensors:
            dicts[place] = tensors
        count += len(tensors)
        if len(tensors) > _MAX_TENSORS or count > _MAX_IN_ALL:
            limits = f"at most {_MAX_TENSORS} in one dictionary and {_MAX_IN_ALL} in all are read"
            raise Refused(f"it holds {count} tensors by name; {limits}. Save the state dict alone")
        long = next((key for key in tensors if len(key) > _LONGEST_NAME), None)
        if long is not None:
            raise Refused(f"it names a tensor by {len(long)} characters; at most {_LONGEST_NAME} are read")
    return dicts


def skipped_objects(value: Any) -> dict[str, str]:
    """Return the objects in a file that are neither tensors nor plain values: place -> name of the type."""
    skipped = {}
    for place, container in _containers(value):
        for key, entry in _entries(container):
            name = _skipped_type(entry)
            if name is not None:
                skipped[_below(place, key)] = name
    return skipped


def other_objects(value: Any) -> dict[str, dict[str, str]]:
    """Return the objects of each dictionary that are neither tensors nor plain values: place -> name -> type."""
    objects = {}
    for place, container in _containers(value):
        if isinstance(container, dict):
            types = {key: _skipped_type(entry) for key, entry in container.items() if type(key) is str}
            objects[place] = {key: name for key, name in types.items() if name is not None}
    return objects


def check_has_tensors(path: Path, value: Any, skipped: dict[str, str]) -> None:
    """Raise the InputError for a file without named tensors, which states what it contains instead.

    Args:
      path: path of the file, for the message.
      value: content of the file.
      skipped: result of :func:`skipped_objects`.

    Raises:
      InputError: always.
    """
    networks = (
        entry.name
        for _, container in _containers(value)
        for _, entry in _entries(container)
        if _globals.is_network(entry)
    )
    network = next(networks, None)
    if network is not None or skipped:
        refused = _globals.network_refusal(network) if network else _globals.refusal(next(iter(skipped.values())))
        raise InputError(f"{path} holds no tensors by name: {refused}.")
    raise InputError(f"{path} holds no tensors by name. Give the file of a state dict.")


def _skipped_type(entry: Any) -> str | None:
    """Return the type of an object that is skipped, or None for tensors and plain values."""
    if isinstance(entry, Array) and entry.tensor is not None:
        return None
    if isinstance(entry, Skipped):
        return None if entry.plain else entry.name
    if isinstance(entry, Global):
        placeholder = _globals.global_placeholder(entry)
        return None if placeholder.plain else placeholder.name
    return "builtins.bytearray" if isinstance(entry, bytearray) else None


def _tensor(entry: Any) -> Tensor | None:
    return entry.tensor if isinstance(entry, Array) else entry if isinstance(entry, Tensor) else None


def _pairs(container: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """Return list(state_dict.items()) as a dictionary; {} for other lists."""
    are_pairs = all(isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[0]) is str for pair in container)
    return dict(container) if container and are_pairs else {}


def _below(place: str, key: str) -> str:
    """Return the place of an entry, with the key shortened."""
    return f"{place}.{key[:_LONGEST]}" if place else key[:_LONGEST]


def _entries(container: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, entry) of a dictionary, or of the first entries of a list or tuple."""
    if isinstance(container, dict):
        for key, entry in container.items():
            if type(key) in (str, int):
                yield str(key), entry
            else:
                yield "(a key)", entry
    else:
        yield from ((str(index), entry) for index, entry in enumerate(container[:_SHORT]))


def _containers(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (place, container) for the dictionaries, lists and tuples in `value`, each once, breadth first."""
    visited: set[int] = set()
    level = [("", value)]
    for _ in range(_DEPTH):
        below: list[tuple[str, Any]] = []
        for place, container in level:
            if not isinstance(container, dict | list | tuple):
                continue
            if id(container) in visited or len(visited) >= _MAX_VISITED:
                continue
            visited.add(id(container))
            yield place, container
            for key, entry in _entries(container):
                if isinstance(entry, dict | list | tuple) and len(below) < _MAX_VISITED:
                    below.append((_below(place, key), entry))
        level = below
