"""Weight files read without PyTorch and without running anything in them.

Taken are safetensors, and what torch.save writes as a zip (since PyTorch 1.6) or wrote before, whatever the file is
called. A `.pt` file is a pickle, which is a program; here only the part of it is understood that describes tensors,
ordered dictionaries and plain values (`_pickle`), and sizes are checked before anything is read (`_files`).
"""

from pathlib import Path
from typing import Any

from bdjax.errors import InputError
from bdjax.files import MOST_WEIGHTS, open_regular
from bdjax.interop import _files
from bdjax.interop._tensors import Refused, Tensor

_DEPTH, _MOST_VISITED = 4, 10_000


def read(path: Path) -> tuple[str, Any]:
    """(format, value) of a weight file: "safetensors", "torch" or "torch before 1.6", and what is in it.

    The value is made of dictionaries, lists, tuples, plain values and `Tensor`s, whose elements are not read yet.
    Raises InputError, one line that names the file and what is wrong, for everything else.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise InputError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}. Give a weight file.")
    with open_regular(path, MOST_WEIGHTS, "a weight file") as file:
        head = file.read(10)
    try:
        if head[:2] == b"PK":
            return "torch", _files.open_zip(path)
        if head[:1] == b"\x80" and head[8:9] != b"{":
            return "torch before 1.6", _files.open_legacy(path)
        if head[8:9] == b"{":
            return "safetensors", _files.open_safetensors(path)
        raise Refused("it is neither a safetensors file nor one of torch.save")
    except Refused as refused:
        raise InputError(f"{path} is not read: {refused}.") from None


def state_dicts(value: Any) -> dict[str, dict[str, Tensor]]:
    """Every dictionary in `value` that holds tensors by name: where it is ("" for `value` itself) -> its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()
    level = [("", value)]
    for _ in range(_DEPTH):
        below = []
        for place, one in level:
            if not isinstance(one, dict) or id(one) in seen or len(seen) >= _MOST_VISITED:
                continue
            seen.add(id(one))
            tensors = {key: held for key, held in one.items() if isinstance(key, str) and isinstance(held, Tensor)}
            if tensors:
                found[place] = tensors
            below += [(f"{place}.{key}" if place else key, held) for key, held in one.items() if isinstance(key, str)]
        level = below
    return found
