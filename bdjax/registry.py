"""Methods by name: a module of a kind's folder is a method, and nothing is imported to list them.

`load` reads a module into its Spec (:mod:`bdjax.protocols`); it is the only place that looks into a module.

A name that ends in `.py` is the path of a user's file. It comes from the command line or from a Python caller, never
from a stored record: what a record names must be installed, or loaded in this process already (`recorded`).
"""

import ast
import difflib
import importlib
import importlib.util
import logging
import os
import pkgutil
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

from bdjax.errors import InputError
from bdjax.text import visible

if TYPE_CHECKING:
    from bdjax.protocols import AttackSpec, DatasetSpec, DefenseSpec, DetectorSpec, ModelSpec

KINDS = ("attacks", "defenses", "detectors", "models", "datasets")
_OWN = "bdjax_user_"  # begins the module names of users' files
_LOG = logging.getLogger("bdjax")


def names(kind: str) -> list[str]:
    """Names of all methods of `kind` (one of KINDS), sorted; modules that begin with `_` and packages are helpers."""
    folder = Path(__file__).parent / kind
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not (m.ispkg or m.name.startswith("_")))


def check(kind: str, name: str) -> None:
    """Raise InputError, with the nearest name and the list, when there is no method `name`."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise InputError(f"no such file: {name}. A name that ends in .py is the path of a method of your own.")
    elif name not in names(kind):
        if kind == "defenses" and name in names("detectors"):
            raise InputError(f"{name} detects backdoors and removes none. Use `bdjax audit DIR --methods {name}`.")
        near = difflib.get_close_matches(name, names(kind), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown {kind.removesuffix('s')} {name!r}.{hint} Known: {', '.join(names(kind))}.")


def summary(kind: str, name: str) -> str:
    """First line of a method's docstring, read without importing it."""
    source = (Path(__file__).parent / kind / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


@overload
def load(kind: Literal["attacks"], name: str) -> "AttackSpec": ...
@overload
def load(kind: Literal["defenses"], name: str) -> "DefenseSpec": ...
@overload
def load(kind: Literal["detectors"], name: str) -> "DetectorSpec": ...
@overload
def load(kind: Literal["models"], name: str) -> "ModelSpec": ...
@overload
def load(kind: Literal["datasets"], name: str) -> "DatasetSpec": ...
@overload
def load(kind: str, name: str) -> Any: ...
def load(kind: str, name: str) -> Any:
    """Read the module of a method into its Spec (:mod:`bdjax.protocols`).

    Raises InputError for an unknown name, with the nearest one and the list, and for a module that does not define
    what its kind needs.
    """
    from bdjax import protocols  # imports jax, which listing names does without

    return protocols.read_spec(kind, name, load_module(kind, name))


def load_module(kind: str, name: str) -> ModuleType:
    """Import the module of a method; a name that ends in `.py` is the path of a user's file, which is executed.

    Raises InputError for an unknown name, with the nearest one and the list.
    """
    check(kind, name)
    if name.endswith(".py"):
        return load_file(Path(name))
    return importlib.import_module(f"bdjax.{kind}.{name}")


def load_file(path: Path) -> ModuleType:
    """A Python file as a module; the same file gives the same module. It is executed, which the log "bdjax" says.

    A file beside an `__init__.py` is loaded as a module of that package, so that it may import its neighbours by
    relative imports (`from ._shared import name`).

    Raises InputError when there is none.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}.")
    path = path.resolve()
    name, folders = f"{_OWN}{path.stem}_{abs(hash(path)):x}", None
    if path.name == "__init__.py":
        name, folders = f"{_OWN}{path.parent.name}_{abs(hash(path)):x}", [str(path.parent)]
    elif (package := path.with_name("__init__.py")).is_file():
        name = f"{load_file(package).__name__}.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    _LOG.info("%s is code of your own and is executed.", path)
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be loaded as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def recorded(kind: str, name: str) -> str:
    """`name` as it stands in a record, if it may be used: an installed method, or a file that is loaded already.

    A file that has moved since is found by its name. Raises InputError for anything else; nothing is loaded.
    """
    if not name.endswith(".py"):
        check(kind, name)
        return name
    return recorded_file(name)


def recorded_file(name: str) -> str:
    """The path of a loaded file of the user's own that a record names. Raises InputError when it is not loaded."""
    files = [Path(str(module.__file__)) for key, module in [*sys.modules.items()] if key.startswith(_OWN)]
    alike = [path for path in files if path.name == Path(name).name]
    exact = [path for path in alike if path == Path(os.path.abspath(name))]
    if exact or len(alike) == 1:
        return str((exact or alike)[0])
    raise InputError(
        f"{name!r} is a file of code, and code is never taken from a directory: nothing was run. If the file is your "
        f"own, name it on the command line as well: --code {shlex.quote(visible(name))}."
    )


def same_file(name: str, other: str) -> bool:
    """Whether two names are the path of one file of code."""
    return name.endswith(".py") and other.endswith(".py") and os.path.abspath(name) == os.path.abspath(other)
