"""NumPy arrays in a pickle. Their bytes are part of the pickle, so they need no storage, and no code is run."""

from math import prod
from typing import Any

import numpy as np

from bdjax.interop._globals import Skipped
from bdjax.interop._tensors import DTYPES, Tensor

RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
_CODES = {f"{dtype.kind}{dtype.itemsize}": name for name, dtype in DTYPES.items() if dtype.kind in "fiub"}


class Dtype(Skipped):
    """numpy.dtype(code), with the byte order from its state."""

    __slots__ = ("code", "order")

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__("numpy.dtype", plain=True)
        code = arguments[0] if arguments and type(arguments[0]) is str else ""
        self.order = code[:1] if code[:1] in "<>=|" else "="
        self.code = code.lstrip("<>=|")

    def build(self, state: Any) -> None:
        """Read the state (version, order, ...)."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]


class Array(Skipped):
    """A NumPy array. `tensor` is None unless it holds plain numbers and all of their bytes."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        super().__init__("numpy.ndarray")
        self.tensor: Tensor | None = None

    def build(self, state: Any) -> None:
        """Read the state (version, shape, dtype, whether in Fortran order, bytes)."""
        if isinstance(state, tuple) and len(state) == 5:
            self.tensor = _tensor(state[4], state[2], state[1], state[3])


def from_buffer(arguments: tuple[Any, ...]) -> Array:
    """Return the array of _frombuffer(bytes, dtype, shape, order), the form of pickle protocol 5."""
    array = Array()
    if len(arguments) == 4:
        array.tensor = _tensor(arguments[0], arguments[1], arguments[2], arguments[3] == "F")
    return array


def _tensor(raw: Any, dtype: Any, shape: Any, fortran_order: Any) -> Tensor | None:
    """Return the tensor, or None unless it holds plain numbers in exactly the bytes that its shape needs."""
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
        return elements.reshape(shape, order="F" if fortran_order else "C")

    return Tensor(name, shape, read)
