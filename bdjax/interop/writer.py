"""Weight files written without PyTorch: safetensors, and the zip that `torch.load(weights_only=True)` takes.

A `.pt` file gets what torch.save gives one: the pickle of an ordered dictionary whose tensors refer to storages, and
each storage as a file of its own, uncompressed and at a multiple of 64 bytes. It has no date: the same weights make the
same bytes.
"""

import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy

_KINDS = {
    "float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip
_ALIGN = 64


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Tensors as a safetensors file."""
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    return safetensors.numpy.save(whole, metadata={"format": "pt"})


def write_torch(file: BinaryIO, tensors: Mapping[str, np.ndarray], folder: str = "archive") -> None:
    """Write tensors as torch.save writes a state dict."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: Any) -> None:
            info = zipfile.ZipInfo(f"{folder}/{name}", (1980, 1, 1, 0, 0, 0))
            begins = file.tell() + 30 + len(info.filename.encode())
            pad = -(begins + 4) % _ALIGN  # a field that readers pass over, as torch's own padding
            info.extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad
            archive.writestr(info, content)

        add("data.pkl", _pickle(tensors))
        add("byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            plain = np.ascontiguousarray(array)
            add(f"data/{key}", plain.astype(plain.dtype.newbyteorder("<"), copy=False).tobytes())
        add("version", b"3\n")


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """OrderedDict of tensors, each _rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict()), protocol 2."""
    empty = b"ccollections\nOrderedDict\n)R"
    items = b"".join(
        _text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + _text("storage")
        + f"ctorch\n{_KINDS[array.dtype.name]}\n".encode()
        + _text(str(key))
        + _text("cpu")
        + _number(array.size)
        + b"tQ"
        + _number(0)
        + _numbers(array.shape)
        + _numbers([int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)])
        + b"\x89"
        + empty
        + b"tR"
        for key, (name, array) in enumerate(tensors.items())
    )
    return b"\x80\x02" + empty + b"(" + items + b"u."


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def _numbers(values: Any) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
