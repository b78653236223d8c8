"""Classes and functions that a pickle may name; no name is imported and no object is built.

The name of a class, or of a function that builds data, becomes a :class:`Skipped` placeholder, whatever its package: it
is listed, and its content is dropped. A name that acts on the machine (os, subprocess, eval ...) occurs beside weights
only in an attack, so such a file is refused.
"""

import re
from typing import Any

from bdjax.interop._tensors import DTYPES, Refused, quote


class Global(str):
    """A name MODULE.NAME in a pickle; it is never imported."""


class Skipped:
    """Placeholder of an object that is not built, with the name of its class or function."""

    __slots__ = ("name", "network", "plain")

    def __init__(self, name: str, plain: bool = False) -> None:
        """Set the name; `plain` marks values that are not listed, such as shapes, dtypes and NumPy scalars."""
        self.name, self.plain = name, plain
        self.network = False  # whether it has modules and parameters, like a whole network


STORAGES = {f"torch.{name}Storage": dtype for name, dtype in (
    ("Float", "float32"), ("Double", "float64"), ("Half", "float16"), ("BFloat16", "bfloat16"), ("Long", "int64"),
    ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8"), ("Bool", "bool"),
)}  # fmt: skip
_PLAIN = {
    "torch.Size", "torch.device", "numpy.ndarray", "numpy.dtype", *(f"torch.{name}" for name in DTYPES),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
}  # fmt: skip
_TYPES = {
    "set", "frozenset", "complex", "range", "xrange", "slice", "bytearray", "object", "type", "list", "tuple", "dict",
    "int", "float", "str", "bytes", "bool", "long", "unicode", "memoryview", "Ellipsis", "NotImplemented",
}  # fmt: skip
_ACTING = {
    "os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "ctypes", "_ctypes", "runpy", "importlib", "imp",
    "zipimport", "pkgutil", "code", "codeop", "pdb", "bdb", "timeit", "webbrowser", "pickle", "_pickle",
    "cloudpickle", "dill", "joblib", "marshal", "shelve", "types", "operator", "_operator", "signal", "pty", "pip",
    "commands", "popen2", "multiprocessing", "asyncio", "threading", "_thread", "_posixsubprocess", "platform",
    "ensurepip", "venv", "cProfile", "profile", "trace", "doctest", "unittest", "inspect", "gc", "atexit", "tempfile",
    "urllib", "urllib2", "http", "httplib", "ftplib", "smtplib", "telnetlib", "xmlrpc", "requests", "io", "_io",
    "linecache", "idlelib", "bdjax", "site", "glob", "fileinput", "mmap", "fcntl", "resource", "sqlite3", "paramiko",
}  # fmt: skip
_HARMLESS = {"types.SimpleNamespace", "io.BytesIO", "io.StringIO", "_io.BytesIO", "_io.StringIO",
             "builtins.getattr", "__builtin__.getattr", "__builtins__.getattr"}  # fmt: skip
"""Exceptions within the modules above; `getattr` encodes enumerations, and its arguments are checked."""
_LONGEST = 300  # largest number of characters of a name
_BUILTINS = ("builtins", "__builtin__", "__builtins__")
_FUNCTIONS = {
    "collections.defaultdict", "collections.deque", "datetime.datetime", "datetime.date", "datetime.time",
    "datetime.timedelta", "datetime.timezone", "functools.partial", "numpy.dtype", "numpy.ndarray", "numpy.matrix",
    "numpy.recarray", "torch.device", "torch.dtype", "array.array", "itertools.count", "easydict.EasyDict",
}  # fmt: skip
_BUILDS = re.compile(r"_\w*?(reconstruct|rebuild|unpickle|ctor|frombuffer|newobj|get_layout|create)")
"""Names of functions that build instances of classes when they are unpickled."""


def checked_global(name: str) -> Global:
    """Return the global `name`. Raises Refused when it acts on the machine."""
    if len(name) > _LONGEST:
        raise Refused(f"it names a class or function by {len(name)} characters; at most {_LONGEST} are read")
    module, _, attribute = name.rpartition(".")
    top = module.partition(".")[0]
    acts = top in _ACTING or (top in _BUILTINS and attribute not in _TYPES and not _is_error(attribute))
    if acts and name not in _HARMLESS:
        raise refusal(name)
    if top in _BUILTINS:  # Python 3's name
        return Global(f"builtins.{'range' if attribute == 'xrange' else attribute}")
    return Global(name)


def placeholder(function: Global, arguments: tuple[Any, ...]) -> Skipped:
    """Return a placeholder for the result of a call. Raises Refused when the function does not build data."""
    name = str(function)
    module, _, attribute = name.rpartition(".")
    if attribute == "getattr" and module in _BUILTINS:
        if len(arguments) == 2 and isinstance(arguments[0], Global) and isinstance(arguments[1], str):
            owner, member = arguments[0], arguments[1]
            if owner.rpartition(".")[2][:1].isupper() and member.isidentifier() and member[0] != "_":
                return Skipped(f"{owner}.{member}"[:200])
        raise refusal(name)
    builds = attribute[:1].isupper() or name in _FUNCTIONS or name in STORAGES or module in _BUILTINS
    if not builds and _BUILDS.match(attribute) is None and name not in _PLAIN and not _is_class(attribute):
        raise refusal(name)
    inner = arguments[0] if arguments and attribute in ("_reconstructor", "_reconstruct", "__newobj__") else None
    return Skipped(str(inner) if isinstance(inner, Global) else name, name in _PLAIN)


def global_placeholder(value: Global) -> Skipped:
    """Return a placeholder for a global that is a value itself, such as a dtype or an activation function."""
    return Skipped(str(value), str(value) in _PLAIN)


def refusal(name: str) -> Refused:
    """Return the exception for a file that names something to run."""
    return Refused(
        f"it asks to run {quote(name)}, which is no tensor and no plain value; nothing was run. If you trust it, "
        "load it where it comes from and save its weights alone: torch.save(model.state_dict(), FILE)"
    )


def network_refusal(name: str) -> Refused:
    """Return the exception for a file that holds a network as an object and no tensors by name."""
    return Refused(
        f"it asks to run {quote(name)}, for it holds a whole network with its program, not weights; nothing was run. "
        "Load it where you trust it and save its weights: torch.save(model.state_dict(), FILE)"
    )


def check_root(value: Any) -> None:
    """Raise Refused when the content of a file is a single placeholder."""
    if isinstance(value, Skipped) and value.name != "numpy.ndarray":
        raise network_refusal(value.name) if is_network(value) else refusal(value.name)
    if isinstance(value, Global):
        raise refusal(str(value))


def is_network(value: Any) -> bool:
    """Whether a placeholder stands for a PyTorch network."""
    return isinstance(value, Skipped) and (value.network or value.name.startswith("torch.nn.modules."))


def is_tensor(name: str) -> bool:
    """Whether a placeholder of that name stands for a tensor that is not read, such as a sparse or quantised one."""
    return name.startswith(("a tensor of ", "torch._utils._rebuild_", "torch._tensor.", "torch.nn.parameter."))


def _is_class(attribute: str) -> bool:
    """Whether a name is in CamelCase after any underscores, such as `_RandomState`."""
    return attribute.lstrip("_")[:1].isupper()


def _is_error(attribute: str) -> bool:
    return attribute.endswith(("Error", "Exception", "Warning"))
