"""Write weight files without PyTorch: safetensors, and the zip that `torch.load(weights_only=True)` reads.

A `.pt` file has the structure of torch.save: the pickle of an ordered dictionary whose tensors refer to storages, and
each storage in a separate entry, uncompressed and aligned to 64 bytes. It contains no date, so the same weights give
the same bytes.
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
    """Return the content of a safetensors file."""
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    return safetensors.numpy.save(contiguous, metadata={"format": "pt"})


def write_torch(file: BinaryIO, tensors: Mapping[str, np.ndarray], folder: str = "archive") -> None:
    """Write tensors in the format of torch.save(state_dict, file).

    Args:
      file: file opened for writing.
      tensors: arrays by name, in order.
      folder: name of the folder in the zip.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: Any) -> None:
            info = zipfile.ZipInfo(f"{folder}/{name}", (1980, 1, 1, 0, 0, 0))
            begins = file.tell() + 30 + len(info.filename.encode())
            pad = -(begins + 4) % _ALIGN  # padding in a field that readers skip, as torch pads
            info.extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad
            archive.writestr(info, content)

        add("data.pkl", _pickle(tensors))
        add("byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            contiguous = np.ascontiguousarray(array)
            add(f"data/{key}", contiguous.astype(contiguous.dtype.newbyteorder("<"), copy=False).tobytes())
        add("version", b"3\n")


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Pickle an OrderedDict of _rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict()), protocol 2."""
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
