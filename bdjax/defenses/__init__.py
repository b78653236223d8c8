"""Defenses: one module a method, each with a `Config` and one function whose name is its kind.

    purify(config, victim, view, key) -> variables

gives back a cleaned model. `view` is all that the defender has: clean images, and a watch that a round
may be shown to. No poisoned image is in reach. A method that can tell whether a model is poisoned, and which class an
attack aims at, adds an audit:

    detect(config, victim, view, key) -> Scores

and if it finds that out while it purifies it tells the watch, by `judge`, and is not asked again. A method that is
given the true trigger as well says NEEDS_TRIGGER = True; where that is the user's choice, it is the name of the
Config's field that says so. A method may audit alone.
"""

from types import ModuleType
from typing import Any

from bdjax import registry
from bdjax.errors import InputError


def purifier(name: str) -> ModuleType:
    """The module of a defense that gives back a model. Raises InputError for one that only audits."""
    module = registry.load("defenses", name)
    if not hasattr(module, "purify"):
        raise InputError(f"{name} audits a model and repairs none. Use `bdjax audit DIR --methods {name}`.")
    return module


def needs_trigger(module: ModuleType, config: Any) -> bool:
    """Whether a method with this Config is given the true trigger."""
    needs = getattr(module, "NEEDS_TRIGGER", False)
    return bool(getattr(config, needs) if isinstance(needs, str) else needs)


def without_trigger() -> list[str]:
    """The defenses that give back a model and, by default, are not given the true trigger."""
    modules = {name: registry.load("defenses", name) for name in registry.names("defenses")}
    able = {name: module for name, module in modules.items() if hasattr(module, "purify")}
    return [name for name, module in able.items() if not needs_trigger(module, module.Config())]
