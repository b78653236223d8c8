"""Arguments of the public API: directories, configs, and how a call is carried out."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bdjax.api.objects import Model, Run
from bdjax.errors import InputError
from bdjax.pipelines.context import Context
from bdjax.reports import progress


def directory_of(model: Model | Run | str | Path) -> Path:
    """The directory of a model or a run."""
    return Path(model) if isinstance(model, str | Path) else model.directory


def make_config(kind: type, value: Any) -> Any:
    """An instance of `kind` from an instance, from a dictionary of fields, or from None for the defaults.

    Raises InputError for a field that it does not have.
    """
    if isinstance(value, kind):
        return value
    fields = {} if value is None else value
    if not isinstance(fields, Mapping):
        raise InputError(f"a {kind.__module__}.{kind.__name__} or a dictionary of its fields is needed, got {value!r}.")
    known = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    if unknown := sorted(set(fields) - set(known)):
        raise InputError(
            f"{kind.__module__}.{kind.__name__} has no field {', '.join(unknown)}. Known: {', '.join(known)}."
        )
    return kind(**fields)


@contextlib.contextmanager
def run_context(devices: int = 0, estimate: bool = False, store: Path | None = None) -> Iterator[Context]:
    """Show a progress bar, on a terminal and in a notebook, while the block runs.

    Args:
      devices: local devices to use, 0 for all.
      estimate: estimate the attack success rate without the trigger.
      store: directory of victims by hash.

    Yields:
      The context of the call.
    """
    with progress.bar() as tick:
        yield Context(devices, tick, estimate, store=store)
