"""What a weight file does not tell of its network: what is assumed, and what else would fit and how well."""

from collections.abc import Callable, Mapping
from typing import Any

from bdjax.errors import InputError
from bdjax.interop import matching
from bdjax.types import Model, Variables

Measure = Callable[[Model, Variables], float]
"""Accuracy of a model on clean images, as a fraction."""


def best_variant(
    fit: matching.Fit, wanted: matching.ModelFacts, again: Callable[[matching.ModelFacts], matching.Fit],
    variables: Variables, measure: Measure,
) -> tuple[matching.Fit, list[dict[str, Any]]]:  # fmt: skip
    """The fit whose network has the highest accuracy, the earliest among equals, and what each one has.

    One option after the other is varied, with what was best of those before: a network for each value, not for each
    combination of them.

    Args:
      again: the fit of other options; the weights are the same ones.

    Returns: the fit, and a list of {"options", "acc"}; "acc" is None where the images do not fit a network. Raises what
    `measure` raises of the network that is assumed.
    """
    open_options = {
        name: values for name, values in fit.options.items() if len(values) > 1 and name not in wanted.chosen
    }
    tried: list[dict[str, Any]] = []
    first = {name: values[0] for name, values in open_options.items()}
    best = (float(measure(fit.model, variables)), first, fit)
    tried.append({"options": first, "acc": best[0]})

    def attempt(options: dict[str, Any]) -> tuple[float, dict[str, Any], matching.Fit] | None:
        try:
            one = again(matching.with_options(wanted, options))
            acc = float(measure(one.model, variables))
        except InputError:
            tried.append({"options": options, "acc": None})
            return None
        tried.append({"options": options, "acc": acc})
        return acc, options, one

    for name, values in open_options.items():
        found = [attempt({**best[1], name: value}) for value in values[1:]]
        best = max([best, *(one for one in found if one is not None)], key=lambda one: one[0])
    return best[2], tried


def assumption_record(fit: matching.Fit, given: Mapping[str, Any], tried: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says: option -> {"value", "instead_of", "by": "default", "flag" or "accuracy"}."""
    measured = {option for one in tried for option in one["options"]}
    found: dict[str, Any] = {}
    for option, values in fit.options.items():
        if len(values) > 1 or option in given:
            by = "flag" if option in given else "accuracy" if option in measured else "default"
            found[option] = {"value": values[0], "instead_of": list(values[1:]), "by": by}
    return found


def option_flag(option: str, value: Any) -> str:
    """How the command line says an option: `--stem max`."""
    if option == "pool" and value == 0:
        value = "global"
    if option == "transform_input":
        return "--transform-input" if value else "no --transform-input"
    return f"--{option} {value}" if option in ("stem", "pool") else f"--network {option}={value}"


def describe(assumed: Mapping[str, Any], tried: list[dict[str, Any]], note: str = "") -> list[str]:
    """Lines for people on what was assumed, and on what was tried."""
    lines = []
    for option, one in assumed.items():
        others = " or ".join(option_flag(option, value) for value in one["instead_of"])
        why = {"default": "assumed", "flag": "as given", "accuracy": "the most accurate"}[one["by"]]
        lines.append(f"{option_flag(option, one['value'])} ({why}{f'; the file would fit {others}, too' if others else ''})")
    for one in tried:
        said = ", ".join(option_flag(option, value) for option, value in one["options"].items()) or "the one that fits"
        acc = "these images do not fit it" if one["acc"] is None else f"accuracy {one['acc']:.4f}"
        lines.append(f"tried {said}: {acc}")
    return [*lines, *([note] if note else [])]
