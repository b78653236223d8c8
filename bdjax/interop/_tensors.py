"""Tensors and storages of a weight file, checked before any of their bytes is read. No code is run."""

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
"""Types of tensor elements by their PyTorch names."""
OTHER_STORAGES = {
    "torch.ComplexFloatStorage": 8, "torch.ComplexDoubleStorage": 16, "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1, "torch.QInt32Storage": 4, "torch.QUInt4x2Storage": 1, "torch.QUInt2x4Storage": 1,
    "torch.storage.UntypedStorage": 1, "torch.UntypedStorage": 1,
}  # fmt: skip
"""Storages of other elements, with their bytes per element. Their tensors are skipped."""


class Refused(Exception):
    """A file is rejected; the message states the reason in one line, without the name of the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, validated but not yet read."""

    dtype: str
    """Key of DTYPES."""
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """`read()` returns the array of that dtype and shape from the file."""


@dataclass
class Storage:
    """A block of elements that tensors are views of; the position of its bytes may become known after the tensors."""

    key: str
    dtype: str
    """Key of DTYPES or of OTHER_STORAGES."""
    count: int
    """Number of elements according to the pickle."""
    path: Path = Path()
    start: int = 0
    """Offset of the first byte in the file; set by :meth:`bind`, as are `path` and `big_endian`."""
    big_endian: bool = False
    views: list["Storage"] = field(default_factory=list)
    """Storages that interpret the same bytes as elements of another type."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else OTHER_STORAGES[self.dtype]

    def bind(self, path: Path, start: int, size: int, big_endian: bool) -> None:
        """Set the position of the bytes in a file.

        Args:
          path: the file.
          start: offset of the first byte.
          size: number of available bytes.
          big_endian: byte order.

        Raises:
          Refused: when fewer bytes are available than the pickle claims.
        """
        need = self.count * self.itemsize
        if size < need:
            raise Refused(f"storage {quote(self.key)} claims {need} bytes and has {max(size, 0)}: the file is cut off")
        for storage in (self, *self.views):
            storage.path, storage.start, storage.big_endian = path, start, big_endian

    def tensor(self, offset: Any, shape: Any, stride: Any) -> Tensor:
        """Create a tensor that is a view of this storage. The arguments come from the file and are validated.

        Args:
          offset: first element.
          shape: shape of the tensor.
          stride: strides in elements.

        Returns:
          The tensor.

        Raises:
          Refused: when the tensor exceeds the storage or overlaps itself.
        """
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
            order, start = ">" if self.big_endian else "<", self.start + offset * dtype.itemsize
            raw = np.fromfile(self.path, f"{order}u{dtype.itemsize}", last + 1 - offset, offset=start)
            elements = raw.astype(f"=u{dtype.itemsize}", copy=False).view(dtype)
            steps = [step * dtype.itemsize for step in stride]
            return np.lib.stride_tricks.as_strided(elements, shape, steps, writeable=False)

        return Tensor(self.dtype, shape, read)


def quote(value: Any) -> str:
    """Format an untrusted value for a message: one short line without control characters."""
    if isinstance(value, tuple | list):
        parts = [type(part).__name__ if isinstance(part, tuple | list) else quote(part) for part in value[:6]]
        return "[" + ", ".join(parts) + (", ..." if len(value) > 6 else "") + "]"
    if isinstance(value, str | bytes):
        return repr(value[:80]) + ("..." if len(value) > 80 else "")
    return repr(value) if isinstance(value, int | float) or value is None else type(value).__name__
