"""Attacks and defenses of dual encoders by name: a module of `attacks/` or `defenses/` is a method.

The rules are those of :mod:`bdjax.registry`; the only place that looks into such a module is :func:`load`.
"""

import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import Literal, overload

from bdjax import registry
from bdjax.errors import InputError
from bdjax.pair_types import PairAttackSpec, PairDefenseSpec

KINDS = ("attacks", "defenses")


def names(kind: str) -> list[str]:
    """Return the names of all methods of a kind, sorted."""
    folder = Path(__file__).parent / kind
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not (m.ispkg or m.name.startswith("_")))


def check(kind: str, name: str) -> None:
    """Raise InputError, with the nearest name and the list, when there is no method `name`."""
    if name not in names(kind):
        near = difflib.get_close_matches(name, names(kind), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if name in registry.names(kind) and not near:
            hint = f" {name} is of classifiers; a dual encoder has methods of its own."
        raise InputError(f"unknown {kind[:-1]} {name!r} of dual encoders.{hint} Known: {', '.join(names(kind))}.")


@overload
def load(kind: Literal["attacks"], name: str) -> PairAttackSpec: ...
@overload
def load(kind: Literal["defenses"], name: str) -> PairDefenseSpec: ...
def load(kind: str, name: str) -> PairAttackSpec | PairDefenseSpec:
    """Read the module of a method into its Spec. Raises InputError for an unknown name."""
    check(kind, name)
    module = importlib.import_module(f"bdjax.vision_language.{kind}.{name}")
    if kind == "attacks":
        prepare = module.prepare if "prepare" in vars(module) else None
        return PairAttackSpec(name, module.Config, module.trigger, module.poison, prepare)
    return PairDefenseSpec(name, module.Config, module.purify)
