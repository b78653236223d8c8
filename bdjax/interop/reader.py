"""Weight files read without PyTorch and without running anything in them.

Taken are safetensors, and what torch.save writes as a zip (since PyTorch 1.6) or wrote before, whatever the file is
called. A `.pt` file is a pickle, which is a program; here only the part of it is understood that describes tensors,
NumPy arrays, dictionaries and plain values (`_pickle`), and sizes are checked before anything is read (`_files`). Other
objects are placeholders that are never built: `skipped_objects` lists them.
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
_MAX_TENSORS, _MAX_IN_ALL = 20_000, 100_000  # by name: in one dictionary, and in all of them
_LONGEST_NAME = 500  # characters
_SHORT = 64  # entries of a list or tuple that are looked into
_LONGEST = 200  # characters of a key, where it is part of a place
_HDF5, _HDF5_PLACES = b"\x89HDF\r\n\x1a\n", (0, 512, 1024, 2048)  # a block of the user's may stand before it
_OTHERS = {
    b"TFL3": "it is a TensorFlow Lite program, which is not read. Give the weights that it was made of",
    b"(\xb5/\xfd": "it is compressed by zstd. Unpack it: unzstd FILE",
    b"7z\xbc\xaf": "it is a 7z archive. Unpack it (7z x FILE) and give the weight file that was in it",
    b"\x1f\x8b": "it is compressed by gzip. Unpack it: gunzip FILE",
    b"BZh": "it is compressed by bzip2. Unpack it: bunzip2 FILE",
    b"\xfd7zXZ": "it is compressed by xz. Unpack it: unxz FILE",
}


def read(path: Path) -> tuple[str, Any]:
    """(format, value) of a weight file: "safetensors", "torch" or "torch before 1.6", and what is in it.

    The value is made of dictionaries, lists, tuples, plain values, placeholders and `Tensor`s, whose elements are not
    read yet. Raises InputError, one line that names the file and what is wrong, for everything else.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise InputError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}. Give a weight file.")
    with open_regular(path, MAX_WEIGHTS, "a weight file") as file:
        head = file.read(_HDF5_PLACES[-1] + len(_HDF5))
    try:
        return _opened(path, head)
    except Refused as refused:
        raise InputError(f"{path} is not read: {refused}.") from None


def _opened(path: Path, head: bytes) -> tuple[str, Any]:
    if any(head.startswith(_HDF5, place) for place in _HDF5_PLACES):
        raise Refused(f"it is an HDF5 file. {_files.KERAS}")
    if head[:2] == b"PK":
        return "torch", _files.open_zip(path)
    if head[:1] == b"\x80" and head[8:9] != b"{":
        return "torch before 1.6", _files.open_legacy(path)
    if head[8:9] == b"{":
        return "safetensors", _files.open_safetensors(path)
    for begin, what in _OTHERS.items():
        if head.startswith(begin) or (begin == b"TFL3" and head.startswith(begin, 4)):
            raise Refused(what)
    if head[257:262] == b"ustar":
        raise Refused("it is a tar archive. Unpack it (tar -xf FILE) and give the weight file that was in it")
    raise Refused("it is neither a safetensors file nor one of torch.save")


def state_dicts(value: Any) -> dict[str, dict[str, Tensor]]:
    """Every dictionary in `value` that holds tensors by name: where it is ("" for `value` itself) -> its tensors.

    Looked for in dictionaries, and in short lists and tuples, whose entries are called by their number: "0.state_dict".
    A list of (name, tensor) pairs counts as a dictionary, a NumPy array as a tensor. Raises Refused for more tensors,
    or longer names, than those of any model.
    """
    count = 0
    found: dict[str, dict[str, Tensor]] = {}
    for place, one in _visited(value):
        pairs = _pairs(one) if isinstance(one, list | tuple) else one
        named = {key: _tensor(held) for key, held in pairs.items() if type(key) is str}
        tensors = {key: held for key, held in named.items() if held is not None}
        if tensors:
            found[place] = tensors
        count += len(tensors)
        if len(tensors) > _MAX_TENSORS or count > _MAX_IN_ALL:
            most = f"at most {_MAX_TENSORS} in one dictionary and {_MAX_IN_ALL} in all are read"
            raise Refused(f"it holds {count} tensors by name; {most}. Save the state dict alone")
        long = next((key for key in tensors if len(key) > _LONGEST_NAME), None)
        if long is not None:
            raise Refused(f"it names a tensor by {len(long)} characters; at most {_LONGEST_NAME} are read")
    return found


def skipped_objects(value: Any) -> dict[str, str]:
    """What in `value` is neither a tensor nor a plain value, and so was passed over: where -> the name of its type."""
    found = {}
    for place, one in _visited(value):
        for key, held in _parts(one):
            name = _passed_over(held)
            if name is not None:
                found[_below(place, key)] = name
    return found


def other_objects(value: Any) -> dict[str, dict[str, str]]:
    """What stands in each dictionary and is neither a tensor nor a plain value: where -> name -> its type's name."""
    found = {}
    for place, one in _visited(value):
        if isinstance(one, dict):
            named = {key: _passed_over(held) for key, held in one.items() if type(key) is str}
            found[place] = {key: name for key, name in named.items() if name is not None}
    return found


def check_has_tensors(path: Path, value: Any, found: dict[str, str]) -> None:
    """Raise InputError for a file without any tensors by name: what stands there in their place."""
    network = next(
        (held.name for _, one in _visited(value) for _, held in _parts(one) if _globals.is_network(held)), None
    )
    if network is not None or found:
        refused = _globals.network_refusal(network) if network else _globals.refusal(next(iter(found.values())))
        raise InputError(f"{path} holds no tensors by name: {refused}.")
    raise InputError(f"{path} holds no tensors by name. Give the file of a state dict.")


def _passed_over(held: Any) -> str | None:
    if isinstance(held, Array) and held.tensor is not None:
        return None
    if isinstance(held, Skipped):
        return None if held.plain else held.name
    if isinstance(held, Global):
        named = _globals.global_placeholder(held)
        return None if named.plain else named.name
    return "builtins.bytearray" if isinstance(held, bytearray) else None


def _tensor(held: Any) -> Tensor | None:
    return held.tensor if isinstance(held, Array) else held if isinstance(held, Tensor) else None


def _pairs(one: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """The pairs of list(state_dict.items()), {} of anything else."""
    alike = all(isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[0]) is str for pair in one)
    return dict(one) if one and alike else {}


def _below(place: str, key: str) -> str:
    """Where an entry is; short, for keys may be megabytes."""
    return f"{place}.{key[:_LONGEST]}" if place else key[:_LONGEST]


def _parts(one: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(one, dict):
        for key, held in one.items():
            if type(key) in (str, int):
                yield str(key), held
            else:
                yield "(a key)", held
    else:
        yield from ((str(place), held) for place, held in enumerate(one[:_SHORT]))


def _visited(value: Any) -> Iterator[tuple[str, Any]]:
    """Dictionaries, lists and tuples in `value`, each once, level by level: where it is, and it."""
    seen: set[int] = set()
    level = [("", value)]
    for _ in range(_DEPTH):
        below: list[tuple[str, Any]] = []
        for place, one in level:
            if not isinstance(one, dict | list | tuple) or id(one) in seen or len(seen) >= _MAX_VISITED:
                continue
            seen.add(id(one))
            yield place, one
            for key, held in _parts(one):
                if isinstance(held, dict | list | tuple) and len(below) < _MAX_VISITED:
                    below.append((_below(place, key), held))
        level = below
