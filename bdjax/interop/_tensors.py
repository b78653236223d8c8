"""What a weight file is read into: tensors that are checked before a byte of them is read, and nothing that runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(jnp.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
"""Of the elements of a tensor, by their name in PyTorch."""
OTHER_STORAGES = {
    "torch.ComplexFloatStorage": 8, "torch.ComplexDoubleStorage": 16, "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1, "torch.QInt32Storage": 4, "torch.QUInt4x2Storage": 1, "torch.QUInt2x4Storage": 1,
    "torch.storage.UntypedStorage": 1, "torch.UntypedStorage": 1,
}  # fmt: skip
"""Storages of elements that are no plain weights: bytes an element. Their tensors are passed over."""


class Refused(Exception):
    """What a file holds is not taken; the message says what, in one line without the file's name."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: checked, not yet read."""

    dtype: str
    """One of DTYPES."""
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """`read() -> array` of that dtype and shape, from the file."""


@dataclass
class Storage:
    """A run of elements that tensors look into; its bytes may be found later than the tensors."""

    key: str
    dtype: str
    """One of DTYPES, or of OTHER_STORAGES."""
    count: int
    """Elements that the pickle claims."""
    path: Path = Path()
    start: int = 0
    """First byte in the file; with `path` and the order of bytes set by whoever finds it."""
    big_endian: bool = False
    views: list["Storage"] = field(default_factory=list)
    """The same bytes as elements of another type."""

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else OTHER_STORAGES[self.dtype]

    def bind(self, path: Path, start: int, size: int, big_endian: bool) -> None:
        """Say where its bytes lie: `size` of them are there. Raises Refused when more were claimed."""
        need = self.count * self.itemsize
        if size < need:
            raise Refused(f"storage {quote(self.key)} claims {need} bytes and has {max(size, 0)}: the file is cut off")
        for storage in (self, *self.views):
            storage.path, storage.start, storage.big_endian = path, start, big_endian

    def tensor(self, offset: Any, shape: Any, stride: Any) -> Tensor:
        """The tensor that begins at element `offset`. Raises Refused when it does not lie inside without overlaps."""
        for name, value in (("shape", shape), ("stride", stride)):
            if not isinstance(value, tuple) or not all(type(size) is int and 0 <= size < 2**48 for size in value):
                raise Refused(f"a tensor's {name} is {quote(value)}, not sizes")
        if type(offset) is not int or offset < 0 or len(shape) != len(stride) or len(shape) > 16:
            raise Refused(f"a tensor begins at {quote(offset)} with shape {quote(shape)} and stride {quote(stride)}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if prod(shape) and (last >= self.count or prod(shape) > self.count):
            raise Refused(f"a tensor of shape {quote(shape)} does not fit into its storage of {self.count} elements")
        reach = 1
        for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
            if step < reach:
                raise Refused(f"a tensor of shape {quote(shape)} and stride {quote(stride)} overlaps itself")
            reach = step * (size - 1) + reach

        def read() -> np.ndarray:
            dtype = DTYPES[self.dtype]
            if not prod(shape):
                return np.zeros(shape, dtype)
            order, place = ">" if self.big_endian else "<", self.start + offset * dtype.itemsize
            raw = np.fromfile(self.path, f"{order}u{dtype.itemsize}", last + 1 - offset, offset=place)
            elements = raw.astype(f"=u{dtype.itemsize}", copy=False).view(dtype)
            steps = [step * dtype.itemsize for step in stride]
            return np.lib.stride_tricks.as_strided(elements, shape, steps, writeable=False)

        return Tensor(self.dtype, shape, read)


def quote(value: Any) -> str:
    """A stranger's value for a message: one line, short, nothing that moves the cursor."""
    if isinstance(value, tuple | list):
        parts = [type(part).__name__ if isinstance(part, tuple | list) else quote(part) for part in value[:6]]
        return "[" + ", ".join(parts) + (", ..." if len(value) > 6 else "") + "]"
    if isinstance(value, str | bytes):
        return repr(value[:80]) + ("..." if len(value) > 80 else "")
    return repr(value) if isinstance(value, int | float) or value is None else type(value).__name__
