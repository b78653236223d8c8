"""bdjax: plant backdoors in neural networks, remove them, and prove that they are gone (JAX/Flax).

    import bdjax

    victim = bdjax.train("badnets", dataset="digits")
    cleaned = bdjax.defend(victim, "ibau")
    print(cleaned)

The functions of :mod:`bdjax.api` are imported when they are first used, so that `import bdjax` is fast.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bdjax.api import (
        Audit,
        EvaluationSource,
        Model,
        Purification,
        Run,
        audit,
        defend,
        evaluate,
        load_dataset,
        load_model,
        purify,
        reactivate,
        run,
        train,
    )

__all__ = [
    "Audit",
    "EvaluationSource",
    "Model",
    "Purification",
    "Run",
    "__version__",
    "audit",
    "defend",
    "evaluate",
    "load_dataset",
    "load_model",
    "purify",
    "reactivate",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a function or class of the public API when it is first used."""
    if name in __all__:
        from bdjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'bdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public API, for completion."""
    return sorted({*globals(), *__all__})
