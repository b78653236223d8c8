"""Containers of weights, read without trusting any number in them: safetensors, torch's zip and its legacy format.

Every size is compared with the size of the file before that many bytes are read, and the elements of a tensor are read
on demand. torch.save does not compress, so nothing is decompressed here.
"""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from bdjax.interop import _globals, _pickle
from bdjax.interop._globals import STORAGES, Global, Skipped
from bdjax.interop._tensors import OTHER_STORAGES, Refused, Storage, Tensor, quote

MAX_BYTES = 96 << 20  # of a pickle, which may contain NumPy arrays; a safetensors header has at most a sixth of it
_MAX_ENTRIES = 20_000  # entries of an archive, tensors of a safetensors file
KERAS = (
    "Weights of Keras are not read. Load it where you trust it (keras.models.load_model(FILE)), give its "
    "arrays PyTorch's names and layouts, and save them: safetensors.numpy.save_file(arrays, 'weights.safetensors'); "
    "docs/your-model.md has the lines"
)
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before PyTorch 1.6
_SAFE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name. Raises Refused when it is damaged."""
    with open(path, "rb") as opened:
        head = opened.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(path.stat().st_size - 8, MAX_BYTES // 6):
        raise Refused(f"it claims a header of {length} bytes: it is cut off, or no safetensors file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
            if len(names) > _MAX_ENTRIES:
                raise Refused(f"it holds {len(names)} tensors, more than any model that can be read")
            return {name: _safe_tensor(path, file, name) for name in names}
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise Refused(f"it is damaged ({quote(str(error))})") from None


def _safe_tensor(path: Path, file: Any, name: str) -> Tensor:
    part = file.get_slice(name)
    dtype = part.get_dtype()
    if dtype not in _SAFE:
        raise Refused(f"tensor {quote(name)} is of type {quote(dtype)}; supported are {', '.join(_SAFE)}")

    def read() -> np.ndarray:
        with safetensors.safe_open(path, framework="numpy") as opened:  # closed at once, because it maps the whole file
            tensor: np.ndarray = opened.get_tensor(name)
            return tensor

    return Tensor(_SAFE[dtype], tuple(part.get_shape()), read)


def open_zip(path: Path) -> Any:
    """Return the value in a zip of torch.save (PyTorch 1.6 and later). Raises Refused when it is another file."""
    entries = _entries(path)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") > 1:
        raise Refused("it is a zip without one data.pkl: torch.save did not write it")
    folder = pickles[0].removesuffix("data.pkl")
    if entries[pickles[0]][1] > MAX_BYTES:
        raise Refused(f"its data.pkl has more than {MAX_BYTES >> 20} MiB; weights are stored in separate entries")
    with open(path, "rb") as file:
        start, size = entries.get(f"{folder}byteorder", (0, 0))
        file.seek(start)
        order = file.read(min(size, 9)) or b"little"
        file.seek(entries[pickles[0]][0])
        stream = io.BytesIO(file.read(entries[pickles[0]][1]))
    if order not in (b"little", b"big"):
        raise Refused(f"its byteorder is {quote(order)}, not little or big")
    known: dict[str, Storage] = {}
    value = _pickle.load(stream, lambda reference: _storage(reference, known))
    _globals.check_root(value)
    for key, storage in known.items():
        if f"{folder}data/{key}" not in entries:
            raise Refused(f"it refers to storage {quote(key)}, which is not in it")
        storage.bind(path, *entries[f"{folder}data/{key}"], order == b"big")
    return value


def _storage(reference: Any, known: dict[str, Storage]) -> Storage:
    """Return the storage of torch's persistent reference ("storage", type, key, device, elements, ...).

    `known` holds the storages by key; a new key is added.
    """
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise Refused(f"it refers to {quote(reference)}, which is not a storage of a tensor")
    kind, key, count = reference[1], reference[2], reference[4]
    dtype = None
    if isinstance(kind, Global):
        dtype = STORAGES.get(kind, str(kind) if kind in OTHER_STORAGES else None)
    if dtype is None or type(key) is not str or type(count) is not int or not 0 <= count < 2**48:
        raise Refused(f"a storage of {quote(kind)} with {quote(count)} elements is not one that can be read")
    entry = known.setdefault(key, Storage(key, dtype, count))
    if (entry.dtype, entry.count) != (dtype, count):
        raise Refused(f"storage {quote(key)} is described in two ways")
    return entry


def _entries(path: Path) -> dict[str, tuple[int, int]]:
    """Return the position of each entry of the archive: name -> (first byte, bytes)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        _check_directory(file, size)
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
            raise Refused(f"it is a damaged zip ({quote(str(error))})") from None
        if len(infos) > _MAX_ENTRIES:
            raise Refused(f"it has {len(infos)} entries, more than any model that can be read")
        _check_kind([info.filename for info in infos])
        positions: dict[str, tuple[int, int]] = {}
        for info in infos:
            name = info.filename
            if name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name:
                raise Refused(f"its entry {quote(name)} points outside of it")
            if name in positions:
                raise Refused(f"its entry {quote(name)} occurs twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
                raise Refused(f"its entry {quote(name)} is compressed, which torch.save never does; it is not unpacked")
            file.seek(max(0, info.header_offset))  # a negative offset is invalid
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\3\4":
                raise Refused(f"its entry {quote(name)} is not at the position in the directory: it is damaged")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            if start + info.file_size > size:
                raise Refused(f"its entry {quote(name)} claims {info.file_size} bytes: it is cut off")
            positions[name] = (start, info.file_size)
    end = 0
    for start, length in sorted(positions.values()):
        if length and start < end:
            raise Refused("two of its entries overlap, which torch.save never writes")
        end = max(end, start + length)
    return positions


def _check_kind(names: list[str]) -> None:
    """Raise Refused, with the remedy, for an archive that does not hold weights."""
    ends = {name.rpartition("/")[2] for name in names}
    if "archive_format" in ends or "serialized_exported_program.json" in ends:
        raise Refused(
            "it is a program of torch.export. Load it where you trust it and save its weights alone: "
            "torch.save(torch.export.load(FILE).state_dict, NEW)"
        )
    if "constants.pkl" in ends or ("model.json" in ends and "data.pkl" not in ends):
        raise Refused(
            "it is a TorchScript program. Load it where you trust it and save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if any(name.endswith((".weights.h5", ".hdf5")) for name in ends):
        raise Refused(f"it is a .keras file. {KERAS}")
    if names and all(name.endswith(".npy") for name in names):
        raise Refused(
            "it is an .npz of NumPy's, not weights of torch.save. Write it anew: "
            "safetensors.numpy.save_file(dict(numpy.load(FILE)), 'weights.safetensors')"
        )


def _check_directory(file: Any, size: int) -> None:
    """Refuse an archive whose directory is too long, before `zipfile` creates an object for each entry."""
    file.seek(max(0, size - 42))
    tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != b"PK\5\6":
        raise Refused("its end record is missing: the zip is cut off, or followed by other data")
    length = struct.unpack("<I", tail[-10:-6])[0]
    if tail[:4] == b"PK\6\7":  # zip64 keeps its sizes in a preceding record
        file.seek(max(0, size - 42 - 56))
        record = file.read(56)
        length = struct.unpack("<Q", record[40:48])[0] if record[:4] == b"PK\6\6" else size
    if length > min(size, _MAX_ENTRIES * 200):
        raise Refused(f"its directory claims {length} bytes, more than {_MAX_ENTRIES} entries of a model take")


def open_legacy(path: Path) -> Any:
    """Return the value in a legacy file of torch.save (before PyTorch 1.6): pickles, then storages."""
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(MAX_BYTES))
    known: dict[str, Storage] = {}
    views: dict[str, tuple[str, int]] = {}
    first = _pickle.load(stream, _no_storage)
    if first != _MAGIC:
        raise Refused("it is a pickle, but not one of torch.save. Save weights by torch.save(model.state_dict(), FILE)")
    protocol, system = _pickle.load(stream, _no_storage), _pickle.load(stream, _no_storage)
    if protocol != _PROTOCOL or not isinstance(system, dict):
        raise Refused(f"it is of protocol {quote(protocol)}; {_PROTOCOL} is read")
    value = _pickle.load(stream, lambda reference: _legacy_storage(reference, known, views))
    _globals.check_root(value)
    keys = _pickle.load(stream, _no_storage)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise Refused("its list of storages is damaged")
    roots = _legacy_roots(path, stream.tell(), keys, known, views)
    for key, storage in known.items():
        root, offset = views.get(key, (key, 0))
        if root not in roots:
            raise Refused(f"it refers to storage {quote(root)}, which is not in it")
        start, size = roots[root]
        begin = offset * storage.itemsize
        storage.bind(path, start + begin, size - begin, system.get("little_endian") is False)
    return value


def _legacy_roots(
    path: Path, position: int, keys: list[str], known: dict[str, Storage], views: dict[str, tuple[str, int]]
) -> dict[str, tuple[int, int]]:
    """Return the position of each storage, consecutive from `position` on: key -> (first byte, bytes)."""
    roots: dict[str, tuple[int, int]] = {}
    file_size = path.stat().st_size
    sizes = {views.get(key, (key, 0))[0]: storage.itemsize for key, storage in known.items()}
    with open(path, "rb") as file:
        for key in keys:
            file.seek(position)
            count = int.from_bytes(file.read(8), "little", signed=True)
            if key not in sizes:
                raise Refused(f"it holds storage {quote(key)}, which no tensor refers to")
            roots[key] = (position + 8, count * sizes[key])
            position += 8 + count * sizes[key]
            if count < 0 or position > file_size:
                raise Refused(f"storage {quote(key)} claims {quote(count)} elements: the file is cut off")
    return roots


def _no_storage(reference: Any) -> Any:
    raise Refused("it is damaged (it refers to a storage where none is allowed)")


def _legacy_storage(reference: Any, known: dict[str, Storage], views: dict[str, tuple[str, int]]) -> Any:
    """Return a storage, or the view of one in old files: (..., elements of the root, (view, offset, elements))."""
    if isinstance(reference, tuple) and reference[:1] == ("module",):  # the class of a network, with its source
        name = reference[1] if len(reference) > 1 else None
        if isinstance(name, Global):
            return name
        placeholder = Skipped(name if type(name) is str else "unnamed")
        placeholder.network = True
        return placeholder
    view = reference[5] if isinstance(reference, tuple) and len(reference) > 5 else None
    if view is None:
        return _storage(reference, known)
    if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or not 0 <= view[1] < 2**48:
        raise Refused(f"a view of a storage is {quote(view)}: it is damaged")
    key = f"{quote(reference[2])} seen as {quote(view[0])}"
    views[key] = (str(reference[2]) if isinstance(reference[2], str) else "", view[1])
    return _storage((*reference[:2], key, reference[3], view[2]), known)
