"""NumPy arrays in a pickle: their bytes are in it, so they are tensors that need no storage. Nothing is run."""

from math import prod
from typing import Any

import numpy as np

from bdjax.interop._globals import Skipped
from bdjax.interop._tensors import DTYPES, Tensor

RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
_CODES = {f"{dtype.kind}{dtype.itemsize}": name for name, dtype in DTYPES.items() if dtype.kind in "fiub"}


class Dtype(Skipped):
    """numpy.dtype(code), and the order of bytes that its state tells."""

    __slots__ = ("code", "order")

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__("numpy.dtype", plain=True)
        code = arguments[0] if arguments and type(arguments[0]) is str else ""
        self.order = code[:1] if code[:1] in "<>=|" else "="
        self.code = code.lstrip("<>=|")

    def build(self, state: Any) -> None:
        """Take the state (version, order, ...)."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]


class Array(Skipped):
    """An array; `tensor` where it is one of plain numbers whose bytes are all there."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        super().__init__("numpy.ndarray")
        self.tensor: Tensor | None = None

    def build(self, state: Any) -> None:
        """Take the state (version, shape, dtype, whether columns come first, bytes)."""
        if isinstance(state, tuple) and len(state) == 5:
            self.tensor = _tensor(state[4], state[2], state[1], state[3])


def from_buffer(arguments: tuple[Any, ...]) -> Array:
    """What _frombuffer(bytes, dtype, shape, order) stands for, as protocol 5 writes arrays."""
    array = Array()
    if len(arguments) == 4:
        array.tensor = _tensor(arguments[0], arguments[1], arguments[2], arguments[3] == "F")
    return array


def _tensor(raw: Any, dtype: Any, shape: Any, columns_first: Any) -> Tensor | None:
    """The tensor, or None for anything but plain numbers in exactly so many bytes."""
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, Dtype) or dtype.code not in _CODES:
        return None
    if not isinstance(shape, tuple) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        return None
    name = _CODES[dtype.code]
    if prod(shape) * DTYPES[name].itemsize != len(raw):
        return None
    stored = np.dtype(f"{'>' if dtype.order == '>' else '<'}{dtype.code}")

    def read() -> np.ndarray:
        if not raw:
            return np.zeros(shape, DTYPES[name])
        elements = np.frombuffer(raw, stored).astype(DTYPES[name], copy=False)
        return elements.reshape(shape, order="F" if columns_first else "C")

    return Tensor(name, shape, read)
